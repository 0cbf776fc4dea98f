"""A trained network with everything it takes to use it: images -> Detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cfg.plan import Plan, parse_plan
from models.network import Network
from models.norms.factory import NormFactory
from models.norms.options import NormOptions, stored_norm
from models.yolo.postprocess import DetectionOptions, postprocess
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.structures import Detections


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
        return postprocess(self.network(images), self.options, units_px)


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
        options, domains = stored_norm(checkpoint.norm, plan), max(1, len(checkpoint.domains))
        network = Network(plan, NormFactory(options=options, domains=domains))
        network.load_state_dict(checkpoint.weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: the checkpoint does not describe its network ({error})") from error
    return network.eval()
