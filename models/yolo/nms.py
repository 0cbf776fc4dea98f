"""Class-wise non-maximum suppression: of two boxes of a class the weaker one goes where they overlap too much.

What counts as overlap (darknet, `box.c`, do_nms_sort and diounms_sort):
    default     IoU
    greedynms   IoU - (d / c)^0.6
    diounms     IoU - (d / c)^beta_nms
with d the squared distance of the centres and c the squared diagonal of the smallest box around both, so that
neighbours with centres apart may overlap more (Zheng et al. 2020, "Distance-IoU Loss", on suppression by DIoU).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms

GREEDY_BETA = 0.6  # fixed in darknet, whatever beta_nms says
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
        """(B, 4), (R, 4) xyxy -> (B, R) bool; boxes without area overlap nothing."""
        overlap = pairwise_iou(boxes, others)
        over = overlap > self.iou
        if self.kind != "default":
            # The distance only takes away from the IoU: few pairs are left to ask for it.
            row, column = over.nonzero(as_tuple=True)
            beta = GREEDY_BETA if self.kind == "greedynms" else self.beta
            penalty = centre_distance(boxes[row], others[column]).pow(beta)
            over[row, column] = overlap[row, column] - penalty > self.iou
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
    if rule.kind == "default":
        return order[_by_kernel(boxes, labels, rule)]
    return order[_by_blocks(boxes / boxes.new_tensor(unit * 2), labels, rule)]


def _by_kernel(boxes: Tensor, labels: Tensor, rule: NmsRule) -> Tensor:
    """Sorted by class, best first -> indices of those that stay. torchvision's nms, class by class.

    Not its batched_nms: that moves the classes apart by the largest coordinate, so that boxes which reach out of the
    picture suppress another class's, and one huge box rounds all the others.
    """
    # Compared in double there: an IoU of 0.6, rounded, must not exceed 0.6.
    threshold = boxes.new_tensor(rule.iou).item()
    falling = torch.arange(len(boxes), 0, -1, device=boxes.device, dtype=boxes.dtype)
    kept, start = [labels[:0]], 0
    for count in labels.unique_consecutive(return_counts=True)[1].tolist():
        of_class = slice(start, start + count)
        kept.append(start + nms(boxes[of_class], falling[of_class], threshold))
        start += count
    return torch.cat(kept)


def _by_blocks(boxes: Tensor, labels: Tensor, rule: NmsRule) -> Tensor:
    """The same by any rule, a block of boxes at a time: what remains of it drops what comes after it."""
    kept, left = [labels[:0]], torch.arange(len(boxes), device=boxes.device)
    while len(left):
        block, left = left[:BLOCK], left[BLOCK:]
        same_class = labels[block][:, None] == labels[block]
        block = block[_stay(rule.exceeded(boxes[block], boxes[block]) & same_class)]
        kept.append(block)
        # Only its last class goes on after the block; the best box of each class stays, so it is still there.
        last = labels[block[-1]]
        block = block[labels[block] == last]
        goes_on = int((labels[left] == last).sum())
        rivals, others = left[:goes_on], left[goes_on:]
        left = torch.cat([rivals[~rule.exceeded(boxes[block], boxes[rivals]).any(0)], others])
    return torch.cat(kept)


def _stay(exceeded: Tensor) -> Tensor:
    """(B, B) bool, [better, weaker] -> (B,) bool: no better box that stays says go.

    Let all stay and apply that sentence again and again: each time at least one answer more is final, since the
    first box's is, and every other one's depends on better boxes only.
    """
    exceeded = exceeded.triu(1)
    stay = torch.ones(len(exceeded), dtype=torch.bool, device=exceeded.device)
    while not torch.equal(again := ~exceeded[stay].any(0), stay):
        stay = again
    return stay


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(B, 4), (R, 4) xyxy -> (B, R); NaN for two boxes without area. torchvision's takes twice the memory."""
    left, top, right, bottom = (edge[:, None] for edge in boxes.unbind(1))
    other_left, other_top, other_right, other_bottom = others.unbind(1)
    shared = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp_(min=0)
    shared *= (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp_(min=0)
    area, other_area = (right - left) * (bottom - top), (other_right - other_left) * (other_bottom - other_top)
    return shared / (area + other_area - shared)


def centre_distance(boxes: Tensor, others: Tensor) -> Tensor:
    """(P, 4), (P, 4) xyxy -> (P,) d / c in 0..1; boxes that overlap have a box around them with a diagonal."""
    twice = boxes[:, :2] + boxes[:, 2:] - others[:, :2] - others[:, 2:]
    around = torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])
    return (twice / 2).square().sum(1) / around.square().sum(1)
