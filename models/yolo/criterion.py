"""Which loss a training uses: one line a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.yolo.darknet_loss import DarknetLoss
from models.yolo.head import RawHead
from models.yolo.loss import LossOptions, LossTerms, YoloLoss
from utils.structures import Targets

Criterion = Callable[[Sequence[RawHead], Targets], LossTerms]

CRITERIA: dict[str, Callable[[LossOptions], Criterion]] = {"autograd": YoloLoss, "darknet": DarknetLoss}


def make_criterion(options: LossOptions) -> Criterion:
    """UserError for settings that the chosen loss does not read."""
    return CRITERIA[options.loss](options)
