"""1 - IoU, GIoU, DIoU or CIoU of pairs of boxes, without a synchronization with the GPU.

The values are torchvision's, whose implementations select by boolean masks and take the gradient of `prod`, which looks
for zeros: both wait for the GPU.

GIoU: Rezatofighi et al. 2019, section 3. DIoU and CIoU: Zheng et al. 2020, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EPS = 1e-7


def iou_loss(boxes: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Return the loss (P,) of boxes against targets, both (P, 4) xyxy. kind: iou, giou, diou or ciou.

    Finite with finite gradients wherever both boxes have positive sides, which the decoder and the readers guarantee.
    """
    sides, target_sides = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    inside = torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])
    intersection = torch.where((inside > 0).all(-1), _area(inside), 0)
    union = _area(sides) + _area(target_sides) - intersection
    iou = intersection / (union + _EPS)
    if kind == "iou":
        return 1 - iou
    hull = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    if kind == "giou":
        return 1 - iou + (_area(hull) - union) / (_area(hull) + _EPS)
    offset = (boxes[:, :2] + boxes[:, 2:] - targets[:, :2] - targets[:, 2:]) / 2
    loss = 1 - iou + offset.square().sum(-1) / (hull.square().sum(-1) + _EPS)
    if kind == "diou":
        return loss
    angle = torch.atan(target_sides[:, 0] / target_sides[:, 1]) - torch.atan(sides[:, 0] / sides[:, 1])
    v = 4 / math.pi**2 * angle.square()
    with torch.no_grad():
        alpha = v / (1 - iou + v + _EPS)
    return loss + alpha * v


def _area(sides: Tensor) -> Tensor:
    return sides[:, 0] * sides[:, 1]
