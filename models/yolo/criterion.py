"""The losses to choose from: one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from models.yolo.darknet_loss import DarknetLoss
from models.yolo.head import RawHead
from models.yolo.loss import LossOptions, LossTerms, YoloLoss
from utils.structures import Targets


class Criterion(Protocol):
    """Computes the loss of a mini-batch, summed over its images."""

    def __call__(self, heads: Sequence[RawHead], targets: Targets, /) -> LossTerms: ...


CRITERIA: dict[str, Callable[[LossOptions], Criterion]] = {"autograd": YoloLoss, "darknet": DarknetLoss}


def make_criterion(options: LossOptions) -> Criterion:
    """Return the chosen loss. Raises UserError for a setting that it does not use."""
    return CRITERIA[options.loss](options)
