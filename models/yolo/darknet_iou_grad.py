"""darknet's hand-written gradients of IoU, GIoU, DIoU and CIoU (box.c, dx_box_iou).

With respect to the box's centre and sides, as shares of the image, and with three deviations from the true derivative:
w and h have twice of it; the enclosing box's part of DIoU has the wrong sign for x and y; CIoU's aspect term lacks
1 / (w^2 + h^2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.transfer import constant_like


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pairs:
    """P boxes and their ground truth. (P, 2) tensors hold x or width, then y or height; (P, 1) one value per pair.

    offset: from the box's centre to that of the ground truth. inside, outside: sides of the intersection, negative
    where the two are apart, and of the enclosing box. within, beyond: (2, P, 2), 1 where the low edges (left, top) and
    the high edges (right, bottom) lie within those of the ground truth, or beyond.
    """

    size: Tensor
    gt_size: Tensor
    offset: Tensor
    inside: Tensor
    outside: Tensor
    within: Tensor
    beyond: Tensor

    @classmethod
    def of(cls, boxes: Tensor, gt: Tensor) -> _Pairs:
        centre, size = boxes[:, :2], boxes[:, 2:]
        gt_centre, gt_size = gt[:, :2], gt[:, 2:]
        size = torch.where(size == 0, 1, size)  # as darknet does, against a division by 0
        low, high = centre - size / 2, centre + size / 2
        gt_low, gt_high = gt_centre - gt_size / 2, gt_centre + gt_size / 2
        return cls(
            size=size,
            gt_size=gt_size,
            offset=gt_centre - centre,
            inside=torch.minimum(high, gt_high) - torch.maximum(low, gt_low),
            outside=torch.maximum(high, gt_high) - torch.minimum(low, gt_low),
            within=torch.stack((low > gt_low, high < gt_high)).to(size.dtype),
            beyond=torch.stack((low < gt_low, high > gt_high)).to(size.dtype),
        )

    @property
    def apart(self) -> Tensor:
        """(P, 1)"""
        return (self.inside <= 0).any(1, keepdim=True)

    @property
    def intersection(self) -> Tensor:
        """(P, 1); as in darknet meaningless where the two are apart, and positive if in both x and y."""
        return self.inside.prod(1, keepdim=True)

    @property
    def union(self) -> Tensor:
        """(P, 1)"""
        return self.size.prod(1, keepdim=True) + self.gt_size.prod(1, keepdim=True) - self.intersection


def iou_grad(boxes: Tensor, gt: Tensor, kind: str) -> Tensor:
    """Return the gradient (P, 4) with respect to x, y, w, h of the boxes.

    boxes, gt: (P, 4) centre and sides as shares of the image. kind: iou, giou, diou or ciou. Not finite where a box is
    not.
    """
    pairs = _Pairs.of(boxes, gt)
    overlap = _overlap_grad(pairs, with_hull=kind == "giou")
    if kind in ("iou", "giou"):
        return overlap
    distance = _distance_grad(pairs, with_aspect=kind == "ciou")
    return torch.where(pairs.apart, distance, overlap + distance)


def _overlap_grad(pairs: _Pairs, *, with_hull: bool) -> Tensor:
    """Return the gradient (P, 4) of IoU, or with the area of the enclosing box (the hull) that of GIoU."""
    intersection, union = pairs.intersection, pairs.union
    # (2, P, 2), with respect to each edge: an edge that moves outward adds its length to the area.
    outward = constant_like((-1.0, 1.0), like=pairs.size).view(2, 1, 1)
    d_intersection = outward * pairs.inside.flip(1) * pairs.within
    d_union = outward * pairs.size.flip(1) - d_intersection
    to_edges = (union * d_intersection - intersection * d_union) / union.square()
    to_edges = torch.where(union > 0, to_edges, 0)
    if with_hull:
        hull = pairs.outside.prod(1, keepdim=True)
        d_hull = outward * pairs.outside.flip(1) * pairs.beyond
        tighter = (hull * d_union - union * d_hull) / hull.square()
        to_edges = torch.where(pairs.apart, tighter, to_edges + tighter)
    to_low, to_high = to_edges
    return torch.cat((to_high + to_low, to_high - to_low), dim=1)


def _distance_grad(pairs: _Pairs, *, with_aspect: bool) -> Tensor:
    """Return minus the gradient (P, 4) of the penalty that DIoU subtracts from IoU, or CIoU."""
    diagonal = pairs.outside.square().sum(1, keepdim=True)
    distance = pairs.offset.square().sum(1, keepdim=True)
    stretch = 2 * pairs.outside * distance / diagonal.square()
    low_beyond, high_beyond = pairs.beyond
    to_centre = 2 * pairs.offset / diagonal - stretch * (high_beyond - low_beyond)
    to_size = stretch * (high_beyond + low_beyond) / 2
    if with_aspect:
        angle = torch.atan(pairs.gt_size[:, :1] / pairs.gt_size[:, 1:])
        angle = angle - torch.atan(pairs.size[:, :1] / pairs.size[:, 1:])
        v = 4 / math.pi**2 * angle.square()
        alpha = v / (1 - pairs.intersection / pairs.union + v + 1e-6)
        turn = 8 / math.pi**2 * alpha * angle * pairs.size.flip(1)
        to_size = to_size + turn * constant_like((1.0, -1.0), like=turn)
    return torch.cat((to_centre, to_size), dim=1)
