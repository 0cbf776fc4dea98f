"""What runs a trained network: PyTorch, here, or the runtime of an exported file (`models/export/`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cfg.plan import Plan
from models.network import Network
from models.yolo.postprocess import DetectionOptions, candidates
from utils.structures import Detections

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


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchPredictor:
    """A network in PyTorch, on the device and in the mode that it is in."""

    network: Network

    @property
    def plan(self) -> Plan:
        return self.network.plan

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def check(self, options: DetectionOptions) -> None:
        pass

    def candidates(self, images: Tensor, *, confidence: float) -> list[Detections]:
        return candidates(self.network(images), confidence=confidence)
