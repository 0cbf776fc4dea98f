"""Arithmetic of axis-aligned boxes, xyxy in any unit. The only file that imports torchvision's operators.

The IoU losses do not use it: their gradient depends on how an IoU is written (`models/yolo/iou_loss.py`).
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from utils.environment import check_torchvision


@lru_cache(maxsize=1)
def _operators() -> ModuleType:
    """Import torchvision.ops on first use. Raises UserError if torchvision is absent or does not fit torch."""
    check_torchvision()
    import torchvision.ops

    return torchvision.ops


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices (K,) of the boxes (N, 4) that greedy suppression keeps, best score (N,) first."""
    return _operators().nms(boxes, scores, iou_threshold)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU of each box of `first` (N, 4) with each of `second` (M, 4), as (N, M)."""
    return _operators().box_iou(first, second)


def elementwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU (...) of boxes and others (..., 4), broadcast. NaN for two boxes without area.

    Equal to the bit to what torchvision's nms computes.
    """
    shared = intersection(boxes, others)
    return shared / (area(boxes) + area(others) - shared)


def share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """Return the share (P, R) of the area of each box (P, 4) that lies inside each region (R, 4)."""
    areas = area(boxes)[:, None]
    return intersection(boxes[:, None], regions) / areas.clamp(min=torch.finfo(areas.dtype).tiny)


def intersection(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the shared area (...) of boxes and others (..., 4), broadcast."""
    left, top, right, bottom = boxes.unbind(-1)  # by column, which is faster than (..., 2) tensors
    other_left, other_top, other_right, other_bottom = others.unbind(-1)
    shared = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp_(min=0)
    return shared.mul_((torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp_(min=0))


def area(boxes: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4)."""
    left, top, right, bottom = boxes.unbind(-1)
    return (right - left) * (bottom - top)


def shape_iou(shapes: Tensor, anchors: Tensor) -> Tensor:
    """Return the IoU (M, A) of boxes that share their centre, from widths and heights (M, 2) and (A, 2)."""
    width = torch.minimum(shapes[:, None, 0], anchors[:, 0])
    shared = width * torch.minimum(shapes[:, None, 1], anchors[:, 1])
    union = shapes.prod(-1)[:, None] + anchors.prod(-1) - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)
