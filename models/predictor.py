"""What runs a trained network: PyTorch, here, or the runtime of an exported file (`models/export/`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cfg.plan import Plan
from models.network import Network
from models.norms.fold import can_fold, fold
from models.packed import can_pack, pack
from models.thresholds import Thresholds
from models.yolo.postprocess import DetectionOptions, candidates
from utils.errors import UserError
from utils.fast_precision import fast_precision
from utils.structures import Detections

TORCH_PRECISIONS = ("auto", "float32", "bf16", "fp16")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EXPORTED = (".onnx", ".xml", ".torchscript")  # endings; OpenVINO's .xml has its weights in a .bin beside it


class Predictor(Protocol):
    """A trained network up to its candidates; suppression follows (`models/yolo/postprocess.py`).

    Several threads may use one at the same time.
    """

    @property
    def plan(self) -> Plan:
        """The cfg, with the input size and the classes that it was trained or exported with."""

    @property
    def device(self) -> torch.device:
        """Where images must be."""

    def check(self, options: DetectionOptions) -> None:
        """Raise UserError for options that it cannot follow, such as below the thresholds in an exported graph."""

    def candidates(self, images: Tensor, *, confidence: float) -> list[Detections]:
        """Return per image all boxes and classes that score above `confidence`, in input pixels, on any device.

        images: (N, 3, H, W) float in 0..1. A file with suppression in its graph returns what survived it.
        """


class ExportedPredictor(Predictor, Protocol):
    """An exported file and its runtime; it says itself what a checkpoint says beside its network."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def letterbox(self) -> bool: ...

    @property
    def thresholds(self) -> Thresholds | None: ...

    @property
    def resize(self) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchPredictor:
    """A network in PyTorch, on the device and in the mode that it is in.

    autocast: the type that it computes in, where that is not the type of its weights.
    """

    network: Network
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    autocast: torch.dtype | None = None

    @property
    def plan(self) -> Plan:
        return self.network.plan

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def check(self, options: DetectionOptions) -> None:
        pass

    def candidates(self, images: Tensor, *, confidence: float) -> list[Detections]:
        images = images.to(self.dtype, memory_format=self.memory_format)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            heads = self.network(images)
        return candidates(heads, confidence=confidence)


def fast_predictor(network: Network, precision: str) -> TorchPredictor:
    """Return a predictor that is as fast as it can be on the network's device: equal results to rounding.

    precision: one of TORCH_PRECISIONS. Norms with running statistics become part of their convolutions. With others,
    such as group norm, auto is float32, and in bf16 or fp16 autocast chooses what is computed in it.
    Raises UserError for fp16 on a CPU.
    """
    device = next(network.parameters()).device
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: choose bf16 or float32")
    is_foldable = can_fold(network)
    if precision == "auto":
        precision, _, _ = fast_precision(device) if is_foldable else ("off", False, "")
    dtype = _DTYPES.get(precision, torch.float32)
    if not is_foldable:
        return TorchPredictor(network=network, autocast=None if dtype == torch.float32 else dtype)
    network = fold(network)
    if can_pack(network):
        return TorchPredictor(network=pack(network, dtype), dtype=dtype, memory_format=torch.channels_last)
    # On GPUs convolutions in float32 are slower with channels last.
    layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
    return TorchPredictor(network=network.to(dtype).to(memory_format=layout), dtype=dtype, memory_format=layout)
