"""Class-wise non-maximum suppression: of two boxes of one class that overlap too much the weaker one is suppressed.

What counts as overlap (darknet, `box.c`, do_nms_sort and diounms_sort):
    default     IoU
    greedynms   IoU - (d / c)^0.6
    diounms     IoU - (d / c)^beta_nms
with d the squared distance of the centres and c the squared diagonal of the smallest box around both, so that
neighbours with distant centres may overlap more (Zheng et al. 2020, "Distance-IoU Loss", on suppression by DIoU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.transfer import constant_like
from utils.boxes import elementwise_iou, nms

GREEDY_BETA = 0.6  # fixed in darknet, whatever beta_nms is

# Measured on a CPU: `_by_pairs` is faster than one call per class of torchvision's kernel up to so many pairs a class,
# the first classes not counted, and faster than `_by_blocks` up to so many pairs in total.
PAIRS_PER_CALL, FREE_CALLS = 1000, 4
MAX_PAIRS = 40_000
PAIRS_IN_MEMORY = 2**20  # about 120 MB
# Boxes that are compared at a time with all remaining ones of their class: a 15 MB table for 30,000 boxes.
BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsRule:
    """A box is suppressed if its overlap with a kept, stronger box of its class exceeds `iou`.

    kind: of cfg.yolo.NMS_KINDS. beta: used by diounms.
    """

    kind: str
    iou: float
    beta: float = GREEDY_BETA

    def exceeded(self, boxes: Tensor, others: Tensor) -> Tensor:
        """(..., 4), (..., 4) xyxy, broadcast -> (...) bool. Boxes without area overlap nothing."""
        overlap = elementwise_iou(boxes, others)
        over = overlap > self.iou
        if self.kind != "default":
            # The distance only reduces the overlap, so it is needed for these few pairs only.
            left = over.nonzero(as_tuple=True)
            boxes, others = (corners.expand(*over.shape, 4)[left] for corners in (boxes, others))
            beta = GREEDY_BETA if self.kind == "greedynms" else self.beta
            over[left] = overlap[left] - centre_distance(boxes, others).pow(beta) > self.iou
        return over


def classwise_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, rule: NmsRule, *, unit: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Return the indices (K,) int64 of the boxes that are kept, class by class.

    boxes: (M, 4) xyxy. scores: (M,); of equal ones the first wins. labels: (M,) int64. unit: width and height in which
    distances are measured, in the unit of the boxes; IoU does not depend on it, d / c does.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    boxes, labels = boxes[order], labels[order]
    sizes = torch.unique_consecutive(labels, return_counts=True)[1]
    if rule.kind != "default":
        boxes = boxes / constant_like(unit * 2, like=boxes)
    return order[_fastest(rule.kind, sizes)(boxes, sizes, rule)]


def _fastest(kind: str, sizes: Tensor) -> Callable[[Tensor, Tensor, NmsRule], Tensor]:
    """Choose among the equivalent implementations below by the sizes (C,) of the classes."""
    pairs = int((sizes * (sizes - 1)).sum()) // 2
    if kind == "default":
        limit = min(PAIRS_PER_CALL * (len(sizes) - FREE_CALLS), PAIRS_IN_MEMORY)
        return _by_pairs if pairs <= limit else _by_kernel
    return _by_pairs if pairs <= MAX_PAIRS else _by_blocks


def _by_kernel(boxes: Tensor, sizes: Tensor, rule: NmsRule) -> Tensor:
    """Return the indices of kept boxes, ascending; boxes are sorted by class, best first, sizes (C,) of the classes.

    IoU only: torchvision's nms, class by class. Not its batched_nms, which separates the classes by adding the largest
    coordinate: boxes that reach out of the image suppress another class's, and one huge box rounds all the others.
    """
    # The kernel compares in double: an IoU of 0.6, rounded to float32, must not exceed 0.6.
    threshold = torch.tensor(rule.iou, dtype=boxes.dtype).item()
    falling = torch.arange(len(boxes), 0, -1, device=boxes.device, dtype=boxes.dtype)
    kept, start = [sizes[:0]], 0
    for count in sizes.tolist():
        of_class = slice(start, start + count)
        kept.append(start + nms(boxes[of_class], falling[of_class], threshold))
        start += count
    return torch.cat(kept)


def _by_pairs(boxes: Tensor, sizes: Tensor, rule: NmsRule) -> Tensor:
    """Compare all pairs of a class at once, by any rule: for few candidates, or candidates of many classes."""
    index = torch.arange(len(boxes), device=boxes.device)
    rivals = sizes.cumsum(0).repeat_interleave(sizes) - index - 1  # number of weaker boxes of the same class
    better = index.repeat_interleave(rivals)
    # The rivals of a box come right after it.
    weaker = torch.arange(len(better), device=boxes.device) + (index + 1 + rivals - rivals.cumsum(0))[better]
    columns = boxes.T.contiguous()  # faster to gather and to compare
    over = rule.exceeded(columns.index_select(1, better).T, columns.index_select(1, weaker).T)
    return _kept(len(boxes), better[over], weaker[over]).nonzero()[:, 0]


def _by_blocks(boxes: Tensor, sizes: Tensor, rule: NmsRule) -> Tensor:
    """Compare a block of boxes with all after it: what is kept of the block suppresses them."""
    labels = torch.arange(len(sizes), device=boxes.device).repeat_interleave(sizes)
    kept, left = [sizes[:0]], torch.arange(len(boxes), device=boxes.device)
    while len(left):
        block, left = left[:BLOCK], left[BLOCK:]
        same_class = labels[block][:, None] == labels[block]
        exceeded = rule.exceeded(boxes[block][:, None], boxes[block]) & same_class
        block = block[_kept(len(block), *exceeded.triu(1).nonzero(as_tuple=True))]
        kept.append(block)
        # Only the block's last class continues after it; as its best box is kept, the class is still in the block.
        last = labels[block[-1]]
        block = block[labels[block] == last]
        rival_count = int((labels[left] == last).sum())
        rivals, others = left[:rival_count], left[rival_count:]
        left = torch.cat([rivals[~rule.exceeded(boxes[block][:, None], boxes[rivals]).any(0)], others])
    return torch.cat(kept)


def _kept(count: int, better: Tensor, weaker: Tensor) -> Tensor:
    """Return a mask (count,) of the boxes kept, where better (E,) suppresses weaker (E,) if it is kept itself.

    Fixed-point iteration from all kept: each pass finalizes at least one more box, because a box depends on better ones
    only, so it terminates.
    """
    kept = torch.ones(count, dtype=torch.bool, device=better.device)
    while not torch.equal(again := torch.ones_like(kept).index_fill(0, weaker[kept[better]], False), kept):
        kept = again
    return kept


def centre_distance(boxes: Tensor, others: Tensor) -> Tensor:
    """Return d / c in 0..1 (P,) of overlapping boxes and others (P, 4) xyxy."""
    twice = boxes[:, :2] + boxes[:, 2:] - others[:, :2] - others[:, 2:]
    around = torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])
    return (twice / 2).square().sum(1) / around.square().sum(1)
