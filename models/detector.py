"""A trained network with everything it takes to use it: images -> Detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from cfg.plan import Plan, parse_plan
from models.network import Network
from models.norms.table import NormOptions, norm_factory
from models.yolo.postprocess import postprocess
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.structures import Detections


@dataclass(frozen=True, kw_only=True, slots=True)
class Detector:
    """Call it with images (N, 3, H, W) in 0..1 on its network's device: N Detections in input pixels.

    resize: of data.geometry.RESIZES, how images become its input. nms, max_detections, units_px: `postprocess`.
    """

    network: Network
    class_names: tuple[str, ...]
    letterbox: bool
    confidence: float
    nms_iou: float
    max_detections: int | None
    nms: str = "cfg"
    resize: str = "opencv"

    @property
    def input_hw(self) -> tuple[int, int]:
        """(height, width) in pixels that images are laid into."""
        return self.network.plan.net.input_hw

    @property
    def size_step_px(self) -> int:
        """Between inputs that fit the network."""
        return self.network.plan.size_step_px

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def __call__(self, images: Tensor, units_px: Sequence[tuple[float, float]] | None = None) -> list[Detections]:
        return postprocess(
            self.network(images),
            confidence=self.confidence,
            nms_iou=self.nms_iou,
            max_detections=self.max_detections,
            nms=self.nms,
            units_px=units_px,
        )


def make_checkpoint(
    plan: Plan, norm: NormOptions, weights: Mapping[str, Tensor], *, class_names: tuple[str, ...], letterbox: bool
) -> Checkpoint:
    """Return the checkpoint from which `build_network` makes the same network again."""
    return Checkpoint(
        cfg_name=plan.name,
        cfg_text=plan.source_text,
        input_hw=plan.net.input_hw,
        letterbox=letterbox,
        class_names=class_names,
        norm=asdict(norm),
        weights=weights,
    )


def build_network(
    checkpoint: Checkpoint, *, path: str = "checkpoint", input_hw: tuple[int, int] | None = None
) -> Network:
    """Return the network that a checkpoint describes, with its averaged weights, in eval mode.

    Raises UserError, which names `path`, if the parts of the checkpoint do not fit each other.
    """
    try:
        plan = parse_plan(
            checkpoint.cfg_text,
            path=checkpoint.cfg_name + ".cfg",
            classes=len(checkpoint.class_names),
            input_hw=input_hw or checkpoint.input_hw,
        )
        network = Network(plan, norm_factory(NormOptions(**checkpoint.norm)))
        network.load_state_dict(checkpoint.weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: the checkpoint does not describe its network ({error})") from error
    return network.eval()


def detector_of(
    checkpoint: Checkpoint,
    *,
    path: str,
    device: torch.device,
    confidence: float,
    nms_iou: float,
    max_detections: int | None,
    nms: str = "cfg",
    resize: str = "opencv",
    input_hw: tuple[int, int] | None = None,
) -> Detector:
    """A checkpoint's network with the rules of detection. UserError as `build_network`."""
    return Detector(
        network=build_network(checkpoint, path=path, input_hw=input_hw).to(device),
        class_names=checkpoint.class_names,
        letterbox=checkpoint.letterbox,
        confidence=confidence,
        nms_iou=nms_iou,
        max_detections=max_detections,
        nms=nms,
        resize=resize,
    )
