"""Where darknet moves a box to overlap another one better (box.c, dx_box_iou).

Nearly the derivative of IoU, GIoU, DIoU or CIoU to the box's centre and sides, as shares of the image. Not the
derivative: that to w and h is twice as large; the enclosing box's part of DIoU has the wrong sign for x and y; CIoU's
aspect term lacks 1 / (w^2 + h^2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.transfer import constant_like


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pairs:
    """P boxes and their truths. (P, 2) tensors hold x or width, then y or height; (P, 1) ones belong to the pair.

    offset: from the box's centre to the truth's. inside, outside: sides of the intersection, negative where the two
    are apart, and of the enclosing box. within, beyond: (2, P, 2), whether the low edges (left, top) and the high ones
    (right, bottom) lie within the truth's, or beyond.
    """

    size: Tensor
    truth_size: Tensor
    offset: Tensor
    inside: Tensor
    outside: Tensor
    within: Tensor
    beyond: Tensor

    @classmethod
    def of(cls, boxes: Tensor, truths: Tensor) -> _Pairs:
        centre, size = boxes.split(2, dim=1)
        truth_centre, truth_size = truths.split(2, dim=1)
        size = torch.where(size == 0, 1, size)  # darknet's, against a division by 0
        low, high = centre - size / 2, centre + size / 2
        truth_low, truth_high = truth_centre - truth_size / 2, truth_centre + truth_size / 2
        return cls(
            size=size,
            truth_size=truth_size,
            offset=truth_centre - centre,
            inside=torch.minimum(high, truth_high) - torch.maximum(low, truth_low),
            outside=torch.maximum(high, truth_high) - torch.minimum(low, truth_low),
            within=torch.stack((low > truth_low, high < truth_high)).to(size.dtype),
            beyond=torch.stack((low < truth_low, high > truth_high)).to(size.dtype),
        )

    @property
    def apart(self) -> Tensor:
        """(P, 1)"""
        return (self.inside <= 0).any(1, keepdim=True)

    @property
    def intersection(self) -> Tensor:
        """(P, 1); as darknet's it is no area where the two are apart, and positive where they are in both ways."""
        return self.inside.prod(1, keepdim=True)

    @property
    def union(self) -> Tensor:
        """(P, 1)"""
        return self.size.prod(1, keepdim=True) + self.truth_size.prod(1, keepdim=True) - self.intersection


def iou_ascent(boxes: Tensor, truths: Tensor, kind: str) -> Tensor:
    """(P, 4), (P, 4) centre and sides as shares of the image -> (P, 4) the way up for x, y, w, h of the boxes.

    kind: iou, giou, diou or ciou. Not finite where a box is not.
    """
    pairs = _Pairs.of(boxes, truths)
    ascent = _overlap_ascent(pairs, with_hull=kind == "giou")
    if kind in ("iou", "giou"):
        return ascent
    closer = _distance_ascent(pairs, with_aspect=kind == "ciou")
    return torch.where(pairs.apart, closer, ascent + closer)


def _overlap_ascent(pairs: _Pairs, *, with_hull: bool) -> Tensor:
    """(P, 4) of IoU, or with the enclosing box's area (the hull) of GIoU."""
    intersection, union = pairs.intersection, pairs.union
    # (2, P, 2), to each edge. An edge that moves outward sweeps the other side.
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


def _distance_ascent(pairs: _Pairs, *, with_aspect: bool) -> Tensor:
    """(P, 4) of what DIoU subtracts from IoU, or CIoU."""
    diagonal = pairs.outside.square().sum(1, keepdim=True)
    distance = pairs.offset.square().sum(1, keepdim=True)
    stretch = 2 * pairs.outside * distance / diagonal.square()
    low_beyond, high_beyond = pairs.beyond
    to_centre = 2 * pairs.offset / diagonal - stretch * (high_beyond - low_beyond)
    to_size = stretch * (high_beyond + low_beyond) / 2
    if with_aspect:
        lean = torch.atan(pairs.truth_size[:, :1] / pairs.truth_size[:, 1:])
        lean = lean - torch.atan(pairs.size[:, :1] / pairs.size[:, 1:])
        v = 4 / math.pi**2 * lean.square()
        alpha = v / (1 - pairs.intersection / pairs.union + v + 1e-6)
        turn = 8 / math.pi**2 * alpha * lean * pairs.size.flip(1)
        to_size = to_size + turn * constant_like((1.0, -1.0), like=turn)
    return torch.cat((to_centre, to_size), dim=1)
