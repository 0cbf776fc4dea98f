"""darknet's hand-written gradients of IoU, GIoU, DIoU and CIoU (box.c, dx_box_iou).

With respect to the box's centre and sides, as shares of the image, and with three deviations from the true derivative:
w and h have twice of it; the enclosing box's part of DIoU has the wrong sign for x and y; CIoU's aspect term lacks
1 / (w^2 + h^2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.transfer import constant_like


def iou_grad(boxes: Tensor, gt: Tensor, kind: str) -> Tensor:
    """Return the gradient (P, 4) with respect to x, y, w, h of the boxes.

    boxes, gt: (P, 4) centre and sides as shares of the image. kind: iou, giou, diou or ciou. Not finite where a box is
    not.
    """
    # (P, 2) tensors hold x or width, then y or height; (P, 1) one value per pair.
    centre, size, gt_centre, gt_size = boxes[:, :2], boxes[:, 2:], gt[:, :2], gt[:, 2:]
    size = torch.where(size == 0, 1, size)  # as darknet does, against a division by 0
    low, high = centre - size / 2, centre + size / 2
    gt_low, gt_high = gt_centre - gt_size / 2, gt_centre + gt_size / 2
    # Sides of the intersection, negative where the two are apart, and of the enclosing box (the hull).
    inside = torch.minimum(high, gt_high) - torch.maximum(low, gt_low)
    outside = torch.maximum(high, gt_high) - torch.minimum(low, gt_low)
    apart = (inside <= 0).any(1, keepdim=True)
    # As in darknet meaningless where the two are apart, and positive if in both x and y.
    intersection = inside.prod(1, keepdim=True)
    union = size.prod(1, keepdim=True) + gt_size.prod(1, keepdim=True) - intersection
    # (2, P, 2): 1 where the low edges (left, top) and the high edges (right, bottom) lie beyond those of the gt.
    beyond = torch.stack((low < gt_low, high > gt_high)).to(size.dtype)

    # (2, P, 2), with respect to each edge: an edge that moves outward adds its length to the area.
    outward = constant_like((-1.0, 1.0), like=size).view(2, 1, 1)
    d_intersection = outward * inside.flip(1) * torch.stack((low > gt_low, high < gt_high))
    d_union = outward * size.flip(1) - d_intersection
    to_edges = torch.where(union > 0, (union * d_intersection - intersection * d_union) / union.square(), 0)
    if kind == "giou":
        hull = outside.prod(1, keepdim=True)
        d_hull = outward * outside.flip(1) * beyond
        tighter = (hull * d_union - union * d_hull) / hull.square()
        to_edges = torch.where(apart, tighter, to_edges + tighter)
    to_low, to_high = to_edges
    overlap = torch.cat((to_high + to_low, to_high - to_low), dim=1)
    if kind in ("iou", "giou"):
        return overlap

    # Minus the gradient of the penalty that DIoU or CIoU subtracts from IoU.
    offset = gt_centre - centre
    diagonal = outside.square().sum(1, keepdim=True)
    stretch = 2 * outside * offset.square().sum(1, keepdim=True) / diagonal.square()
    low_beyond, high_beyond = beyond
    to_centre = 2 * offset / diagonal - stretch * (high_beyond - low_beyond)
    to_size = stretch * (high_beyond + low_beyond) / 2
    if kind == "ciou":
        angle = torch.atan(gt_size[:, :1] / gt_size[:, 1:]) - torch.atan(size[:, :1] / size[:, 1:])
        v = 4 / math.pi**2 * angle.square()
        alpha = v / (1 - intersection / union + v + 1e-6)
        turn = 8 / math.pi**2 * alpha * angle * size.flip(1)
        to_size = to_size + turn * constant_like((1.0, -1.0), like=turn)
    penalty = torch.cat((to_centre, to_size), dim=1)
    return torch.where(apart, penalty, overlap + penalty)
