"""The losses to choose from: one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.yolo.darknet_loss import DarknetLoss
from models.yolo.head import RawHead
from models.yolo.loss import LossOptions, LossTerms, YoloLoss
from utils.structures import Targets

Criterion = Callable[[Sequence[RawHead], Targets], LossTerms]  # of a mini-batch, summed over its images
CRITERIA: dict[str, Callable[[LossOptions], Criterion]] = {"autograd": YoloLoss, "darknet": DarknetLoss}


def make_criterion(options: LossOptions) -> Criterion:
    """Return the chosen loss. Raises UserError for a setting that it does not use."""
    return CRITERIA[options.loss](options)
