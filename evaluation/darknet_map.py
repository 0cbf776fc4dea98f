"""Average precision as darknet's `detector map` computes it (darknet, `detector.c`, validate_detector_map).

Differences from COCO's: one IoU, a detection matches only the object that it overlaps most, all objects count alike,
and so do all detections above darknet's own thresholds, however many and however far outside the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.image_set import ImageSet
from evaluation.coco_map import per_cent
from evaluation.evaluator import category_of_label
from evaluation.inference import detect_batches, image_batches
from models.detector import Detector
from utils.boxes import box_iou
from utils.printable import printable
from utils.structures import Detections

CONFIDENCE, NMS_IOU = 0.005, 0.45  # of the detections that are measured
POINTS = (0, 11, 101)  # 0: the area under the curve

WHY_NOT_COCO = (
    f"darknet's AP is not COCO's AP50: at one IoU it takes all detections above {CONFIDENCE} after NMS at {NMS_IOU}, "
    "their boxes not cut to the image, where COCO takes the best 100 of an image, it matches a detection only "
    "with the object it overlaps most, counts crowds and difficult objects like any other, and averages over all "
    "classes of the network, those without objects as 0"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DarknetRow:
    """One class. AP in 0..1, 0 without objects."""

    name: str
    objects: int
    detections: int
    AP: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DarknetTable:
    """classes: one row per class of the network. iou: must be exceeded to match. points: of POINTS."""

    classes: tuple[DarknetRow, ...]
    iou: float
    points: int

    @property
    def mAP(self) -> float:
        """Mean over all classes."""
        return float(np.mean([row.AP for row in self.classes]))

    def summary(self) -> str:
        """Return mAP, and an aligned table of the classes that have objects or detections, in per cent."""
        rows = [row for row in self.classes if row.objects or row.detections]
        width = max([len("class"), *(len(row.name) for row in rows)])
        lines = [f"{'class':<{width}}  objects  detections    AP"]
        lines += [
            f"{row.name:<{width}}  {row.objects:>7d}  {row.detections:>10d}  {per_cent(row.AP):>4}" for row in rows
        ]
        over = f"{self.points} recall points" if self.points else "area under the curve"
        lines.append(f"mAP@{self.iou:.2f} = {per_cent(self.mAP)}, {over}, mean of {len(self.classes)} classes")
        return "\n".join(lines)


def measure_as_darknet(
    detector: Detector, image_set: ImageSet, *, iou: float, points: int, batch_size: int, workers: int
) -> DarknetTable:
    """Run `detector` over the images with darknet's thresholds, and compute darknet's AP.

    Raises UserError if the classes do not match (`category_of_label`).
    """
    category_of_label(detector.class_names, image_set.class_names, image_set.category_ids)
    labels = torch.tensor([detector.class_names.index(name) for name in image_set.class_names])
    detector = detector.with_options(confidence=CONFIDENCE, nms_iou=NMS_IOU, max_detections=None)
    batches = image_batches(detector, image_set, batch_size=batch_size, workers=workers)

    def detections_and_ground_truth() -> Iterator[tuple[Detections, Tensor, Tensor]]:
        """Yield detections and ground truth in input pixels, where IoU is the same as in the image."""
        for batch, found in detect_batches(detector, batches, relative=True, shown_of=len(image_set)):
            for index, detections in enumerate(found):
                targets = batch.targets.of_images(index, index + 1)
                yield detections, targets.boxes, labels[targets.labels]

    return evaluate_darknet(detections_and_ground_truth(), detector.class_names, iou=iou, points=points)


def evaluate_darknet(
    images: Iterable[tuple[Detections, Tensor, Tensor]], class_names: Sequence[str], *, iou: float, points: int
) -> DarknetTable:
    """images: of each its detections, and the ground truth's boxes (T, 4), in the same unit, and labels (T,) int64."""
    scores, labels, matches, gt_labels = [], [], [], []
    objects = 0
    for found, boxes, labels_of_image in images:
        matched = matched_objects(found, boxes, labels_of_image, iou=iou)
        matches.append(torch.where(matched < 0, -1, matched + objects).cpu().numpy())
        scores.append(found.scores.cpu().numpy())
        labels.append(found.labels.cpu().numpy())
        gt_labels.append(labels_of_image.cpu().numpy())
        objects += len(labels_of_image)
    score, label, match, gt_label = map(np.concatenate, (scores, labels, matches, gt_labels))
    rows = []
    for number, name in enumerate(class_names):
        of_class, count = label == number, int((gt_label == number).sum())
        AP = average_precision(score[of_class], match[of_class], count, points=points)
        rows.append(DarknetRow(name=printable(name), objects=count, detections=int(of_class.sum()), AP=AP))
    return DarknetTable(classes=tuple(rows), iou=iou, points=points)


def matched_objects(found: Detections, boxes: Tensor, labels: Tensor, *, iou: float) -> Tensor:
    """Return for each detection the object of its class in the image that it overlaps most: indices (K,) int64.

    -1 where that overlap does not exceed `iou`. Several detections may match the same object.
    """
    if len(labels) == 0:
        return torch.full_like(found.labels, -1)
    overlaps = box_iou(found.boxes, boxes).masked_fill(found.labels[:, None] != labels, 0)
    most, index = overlaps.max(1)
    return torch.where(most > iou, index, -1)


def average_precision(scores: np.ndarray, matches: np.ndarray, objects: int, *, points: int) -> float:
    """Compute the AP of one class from scores (D,) and matches (D,), the object that each detection matches or -1.

    The best detection that matches an object is a true positive, all others are false. objects: how many there are.
    points: of POINTS.
    """
    if objects == 0 or len(scores) == 0:
        return 0.0
    matches = matches[np.argsort(-scores, kind="stable")]
    matched, first = np.unique(matches, return_index=True)
    is_true = np.zeros(len(matches), bool)
    is_true[first[matched >= 0]] = True
    true_positives = np.cumsum(is_true)
    recall = true_positives / objects
    precision = true_positives / np.arange(1, len(true_positives) + 1)
    # The best precision at this or any higher recall.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if points == 0:
        return float((np.diff(recall, prepend=0) * envelope).sum())
    reached = np.searchsorted(recall, np.arange(points) / (points - 1))
    return float(np.append(envelope, 0)[reached].mean())
