"""Axis-aligned boxes, xyxy: overlap and suppression. The only file that imports torchvision's operators."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from torch import Tensor

from utils.environment import check_torchvision


@lru_cache(maxsize=1)
def _operators() -> ModuleType:
    """Import torchvision.ops on first use. UserError where torchvision is absent or does not fit torch."""
    check_torchvision()
    import torchvision.ops

    return torchvision.ops


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU of each box of `first` (N, 4) with each of `second` (M, 4), as (N, M)."""
    return _operators().box_iou(first, second)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices (K,) of the boxes (N, 4) that greedy suppression keeps, best score (N,) first."""
    return _operators().nms(boxes, scores, iou_threshold)
