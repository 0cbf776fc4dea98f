"""Average precision as darknet's `detector map` has it (darknet, `detector.c`, validate_detector_map).

Not COCO's: one IoU, a detection claims the truth it covers best and no other, all truths count alike, and so do
all detections above darknet's own thresholds, however many and however far they reach out of the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.boxes import box_iou
from utils.structures import Detections

CONFIDENCE, NMS_IOU = 0.005, 0.45  # of the detections that are measured
POINTS = (0, 11, 101)  # 0: the area under the curve

WHY_NOT_COCO = (
    f"darknet's AP is not COCO's AP50: at one IoU it takes all detections above {CONFIDENCE} after NMS at {NMS_IOU}, "
    "their boxes not cut to the image, where COCO takes the best 100 of an image, it lets a detection claim only "
    "the object it covers best, has crowds and difficult objects count like any other, and averages over all classes "
    "of the network, those without objects as 0"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DarknetRow:
    """One class. AP in 0..1, 0 where there is nothing to find."""

    name: str
    truths: int
    detections: int
    AP: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DarknetTable:
    """classes: one row per class of the network. iou: that a detection must exceed. points: of POINTS."""

    classes: tuple[DarknetRow, ...]
    iou: float
    points: int

    @property
    def mAP(self) -> float:
        """The mean over all classes."""
        return float(np.mean([row.AP for row in self.classes]))

    def summary(self) -> str:
        """mAP, and an aligned table of the classes that have truths or detections."""
        rows = [row for row in self.classes if row.truths or row.detections]
        width = max([len("class"), *(len(row.name) for row in rows)])
        lines = [f"{'class':<{width}}  objects  detections      AP"]
        lines += [f"{row.name:<{width}}  {row.truths:>7d}  {row.detections:>10d}  {row.AP:>6.4f}" for row in rows]
        over = f"{self.points} recall points" if self.points else "area under the curve"
        lines.append(f"mAP@{self.iou:.2f} = {self.mAP:.4f}, {over}, mean of {len(self.classes)} classes")
        return "\n".join(lines)


def evaluate_darknet(
    images: Iterable[tuple[Detections, Tensor, Tensor]], class_names: Sequence[str], *, iou: float, points: int
) -> DarknetTable:
    """images: of each its detections, and its truths' boxes (T, 4), in the same unit, and labels (T,) int64."""
    scores, labels, claims, truth_labels = [], [], [], []
    truths = 0
    for found, boxes, of_truth in images:
        claimed = claimed_truths(found, boxes, of_truth, iou=iou)
        claims.append(torch.where(claimed < 0, -1, claimed + truths).cpu().numpy())
        scores.append(found.scores.cpu().numpy())
        labels.append(found.labels.cpu().numpy())
        truth_labels.append(of_truth.cpu().numpy())
        truths += len(of_truth)
    score, label, claim, truth_label = map(np.concatenate, (scores, labels, claims, truth_labels))
    rows = []
    for number, name in enumerate(class_names):
        of_class, count = label == number, int((truth_label == number).sum())
        AP = average_precision(score[of_class], claim[of_class], count, points=points)
        rows.append(DarknetRow(name=name, truths=count, detections=int(of_class.sum()), AP=AP))
    return DarknetTable(classes=tuple(rows), iou=iou, points=points)


def claimed_truths(found: Detections, boxes: Tensor, labels: Tensor, *, iou: float) -> Tensor:
    """Of each detection, which of one image's truths it overlaps most among those of its class: (K,) int64.

    -1 where that overlap does not exceed `iou`. Several detections may claim the same truth.
    """
    if len(labels) == 0:
        return torch.full_like(found.labels, -1)
    overlaps = box_iou(found.boxes, boxes).masked_fill(found.labels[:, None] != labels, 0)
    most, truth = overlaps.max(1)
    return torch.where(most > iou, truth, -1)


def average_precision(scores: np.ndarray, claims: np.ndarray, truths: int, *, points: int) -> float:
    """Of one class: scores (D,), claims (D,) the truth that each detection claims or -1, truths that there are.

    The best detection that claims a truth is right, all others are wrong. points: of POINTS.
    """
    if truths == 0 or len(scores) == 0:
        return 0.0
    claims = claims[np.argsort(-scores, kind="stable")]
    claimed, first = np.unique(claims, return_index=True)
    right = np.zeros(len(claims), bool)
    right[first[claimed >= 0]] = True
    found = np.cumsum(right)
    recall = found / truths
    precision = found / np.arange(1, len(found) + 1)
    # The best precision at this or any higher recall.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if points == 0:
        return float((np.diff(recall, prepend=0) * envelope).sum())
    reached = np.searchsorted(recall, np.arange(points) / (points - 1))
    return float(np.append(envelope, 0)[reached].mean())
