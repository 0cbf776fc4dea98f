"""A trained network with everything it takes to use it: images -> Detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cfg.plan import Plan, parse_plan
from cfg.yolo import NMS_KINDS
from models.network import Network
from models.norms.table import NormOptions, norm_factory, stored_norm
from models.yolo.postprocess import postprocess
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.knob import knob
from utils.structures import Detections


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionOptions:
    """How an image becomes the network's input, and which of its predictions are detections. Defaults: COCO's AP."""

    resize: str = knob(
        "opencv",
        "how an image becomes the network's input: OpenCV, which averages where it shrinks, or darknet's own bilinear",
        choices=("opencv", "darknet"),  # data.geometry.RESIZES
    )
    nms: str = knob(
        "cfg",
        "overlap of two boxes: default = IoU; greedynms, diounms = less a share for their centres' distance; cfg = "
        "what the network's last [yolo] specifies",
        choices=("cfg", *NMS_KINDS),
    )
    confidence: float = knob(0.001, "drop detections below this score", low=0, high=1)
    nms_iou: float = knob(
        0.6, "of two boxes of a class that overlap more than this, suppress the one with the lower score", low=0, high=1
    )
    max_detections: int | None = knob(100, "keep this many per image, best first; COCO scores 100", unit="N", low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Detector:
    """Call it with images (N, 3, H, W) in 0..1 on its network's device: returns N Detections in input pixels."""

    network: Network
    class_names: tuple[str, ...]
    letterbox: bool
    options: DetectionOptions

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        options: DetectionOptions,
        *,
        path: str,
        device: torch.device,
        input_hw: tuple[int, int] | None = None,
    ) -> Detector:
        """input_hw: in place of the checkpoint's. Raises UserError as `build_network`."""
        return cls(
            network=build_network(checkpoint, path=path, input_hw=input_hw).to(device),
            class_names=checkpoint.class_names,
            letterbox=checkpoint.letterbox,
            options=options,
        )

    def with_options(self, **changed: Any) -> Detector:
        """Return the same detector with other options."""
        return replace(self, options=replace(self.options, **changed))

    @property
    def input_hw(self) -> tuple[int, int]:
        """(height, width) in pixels that images are laid into."""
        return self.network.plan.net.input_hw

    @property
    def size_step_px(self) -> int:
        """What the sides of an input must be multiples of."""
        return self.network.plan.size_step_px

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def __call__(self, images: Tensor, units_px: Sequence[tuple[float, float]] | None = None) -> list[Detections]:
        """units_px: per image, the unit (width, height) in which NMS measures distances; None: input pixels."""
        return postprocess(
            self.network(images),
            confidence=self.options.confidence,
            nms_iou=self.options.nms_iou,
            max_detections=self.options.max_detections,
            nms=self.options.nms,
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
        network = Network(plan, norm_factory(stored_norm(checkpoint.norm)))
        network.load_state_dict(checkpoint.weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: the checkpoint does not describe its network ({error})") from error
    return network.eval()
