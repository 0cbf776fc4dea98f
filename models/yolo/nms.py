"""Class-wise non-maximum suppression: of two boxes of a class the weaker one goes where they overlap too much.

What counts as overlap (darknet, `box.c`, do_nms_sort and diounms_sort):
    default     IoU
    greedynms   IoU - (d / c)^0.6
    diounms     IoU - (d / c)^beta_nms
with d the squared distance of the centres and c the squared diagonal of the smallest box around both, so that
neighbours with centres apart may overlap more (Zheng et al. 2020, "Distance-IoU Loss", on suppression by DIoU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.transfer import constant_like
from utils.boxes import nms

GREEDY_BETA = 0.6  # fixed in darknet, whatever beta_nms says

# Measured on a CPU: up to so many pairs a class, but for its first classes, `_by_pairs` is quicker than a call a class
# of torchvision's kernel; and up to so many pairs in all it is quicker than `_by_blocks`.
PAIRS_A_CALL, FREE_CALLS = 1000, 4
MAX_PAIRS = 40_000
PAIRS_IN_MEMORY = 2**20  # which take about 120 MB
# So many boxes at a time are compared with all of their class that remain: 15 MB a table for 30,000 boxes.
BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsRule:
    """A weaker box of the class goes where its overlap with one that stays exceeds `iou`.

    kind: of cfg.yolo.NMS_KINDS. beta: diounms reads it.
    """

    kind: str
    iou: float
    beta: float = GREEDY_BETA

    def exceeded(self, boxes: Tensor, others: Tensor) -> Tensor:
        """(..., 4), (..., 4) xyxy, broadcast -> (...) bool; boxes without area overlap nothing."""
        overlap = box_iou(boxes, others)
        over = overlap > self.iou
        if self.kind != "default":
            # The distance only takes away from the IoU: few pairs are left to ask for it.
            left = over.nonzero(as_tuple=True)
            boxes, others = (each.expand(*over.shape, 4)[left] for each in (boxes, others))
            beta = GREEDY_BETA if self.kind == "greedynms" else self.beta
            over[left] = overlap[left] - centre_distance(boxes, others).pow(beta) > self.iou
        return over


def survivors(
    boxes: Tensor, scores: Tensor, labels: Tensor, rule: NmsRule, *, unit: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Boxes (M, 4) xyxy, scores (M,), labels (M,) int64 -> (K,) int64 indices of those that stay, class by class.

    Of equal scores the earlier one counts as the better. unit: width and height of what distances are measured in,
    in the boxes' unit; IoU does not depend on it, d / c does.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    boxes, labels = boxes[order], labels[order]
    sizes = labels.unique_consecutive(return_counts=True)[1]
    if rule.kind != "default":
        boxes = boxes / constant_like(unit * 2, like=boxes)
    return order[_quickest(rule.kind, sizes)(boxes, sizes, rule)]


def _quickest(kind: str, sizes: Tensor) -> Callable[[Tensor, Tensor, NmsRule], Tensor]:
    """Of the three ways below, which say the same; sizes: (C,) of the classes."""
    pairs = int((sizes * (sizes - 1)).sum()) // 2
    if kind == "default":
        limit = min(PAIRS_A_CALL * (len(sizes) - FREE_CALLS), PAIRS_IN_MEMORY)
        return _by_pairs if pairs <= limit else _by_kernel
    return _by_pairs if pairs <= MAX_PAIRS else _by_blocks


def _by_kernel(boxes: Tensor, sizes: Tensor, rule: NmsRule) -> Tensor:
    """Boxes sorted by class, best first, sizes (C,) of the classes -> indices of those that stay, in that order.

    By IoU only: torchvision's nms, class by class. Not its batched_nms: that moves the classes apart by the largest
    coordinate, so that boxes which reach out of the image suppress another class's, and one huge box rounds all the
    others.
    """
    # Compared in double there: an IoU of 0.6, rounded, must not exceed 0.6.
    threshold = torch.tensor(rule.iou, dtype=boxes.dtype).item()
    falling = torch.arange(len(boxes), 0, -1, device=boxes.device, dtype=boxes.dtype)
    kept, start = [sizes[:0]], 0
    for count in sizes.tolist():
        of_class = slice(start, start + count)
        kept.append(start + nms(boxes[of_class], falling[of_class], threshold))
        start += count
    return torch.cat(kept)


def _by_pairs(boxes: Tensor, sizes: Tensor, rule: NmsRule) -> Tensor:
    """The same by any rule, all pairs of a class at once: few, where candidates are few or of many classes."""
    index = torch.arange(len(boxes), device=boxes.device)
    rivals = sizes.cumsum(0).repeat_interleave(sizes) - index - 1  # weaker boxes of its class
    better = index.repeat_interleave(rivals)
    # Its own rivals come right after it.
    weaker = torch.arange(len(better), device=boxes.device) + (index + 1 + rivals - rivals.cumsum(0))[better]
    edges = boxes.T.contiguous()  # is quicker to gather and to compare
    over = rule.exceeded(edges.index_select(1, better).T, edges.index_select(1, weaker).T)
    return _stay(len(boxes), better[over], weaker[over]).nonzero()[:, 0]


def _by_blocks(boxes: Tensor, sizes: Tensor, rule: NmsRule) -> Tensor:
    """The same, a block of boxes at a time: what remains of it drops what comes after it."""
    labels = torch.arange(len(sizes), device=boxes.device).repeat_interleave(sizes)
    kept, left = [sizes[:0]], torch.arange(len(boxes), device=boxes.device)
    while len(left):
        block, left = left[:BLOCK], left[BLOCK:]
        same_class = labels[block][:, None] == labels[block]
        exceeded = rule.exceeded(boxes[block][:, None], boxes[block]) & same_class
        block = block[_stay(len(block), *exceeded.triu(1).nonzero(as_tuple=True))]
        kept.append(block)
        # Only its last class goes on after the block; the best box of each class stays, so it is still there.
        last = labels[block[-1]]
        block = block[labels[block] == last]
        goes_on = int((labels[left] == last).sum())
        rivals, others = left[:goes_on], left[goes_on:]
        left = torch.cat([rivals[~rule.exceeded(boxes[block][:, None], boxes[rivals]).any(0)], others])
    return torch.cat(kept)


def _stay(count: int, better: Tensor, weaker: Tensor) -> Tensor:
    """(E,), (E,) indices of a better box and of one that goes if it stays -> (count,) bool, which stay.

    Let all stay and apply that sentence again and again: each time at least one answer more is final, since the
    first box's is, and every other one's depends on better boxes only.
    """
    stay = torch.ones(count, dtype=torch.bool, device=better.device)
    while not torch.equal(again := torch.ones_like(stay).index_fill(0, weaker[stay[better]], False), stay):
        stay = again
    return stay


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(..., 4), (..., 4) xyxy, broadcast -> (...); NaN for two boxes without area. To the bit as torchvision's nms."""
    left, top, right, bottom = boxes.unbind(-1)
    other_left, other_top, other_right, other_bottom = others.unbind(-1)
    shared = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp_(min=0)
    shared *= (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp_(min=0)
    area, other_area = (right - left) * (bottom - top), (other_right - other_left) * (other_bottom - other_top)
    return shared / (area + other_area - shared)


def centre_distance(boxes: Tensor, others: Tensor) -> Tensor:
    """(P, 4), (P, 4) xyxy -> (P,) d / c in 0..1; boxes that overlap have a box around them with a diagonal."""
    twice = boxes[:, :2] + boxes[:, 2:] - others[:, :2] - others[:, 2:]
    around = torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])
    return (twice / 2).square().sum(1) / around.square().sum(1)
