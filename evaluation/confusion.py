"""Confusion matrix over detections, with a background row and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.coco_results import CocoResults
from utils.boxes import box_iou, share_inside


def confusion_matrix(
    ground_truth: Mapping[str, Any],
    results: CocoResults,
    *,
    image_ids: Sequence[int] | None = None,
    min_iou: float = 0.5,
    min_score: float = 0.25,
) -> np.ndarray:
    """Return counts, (C + 1, C + 1) int64: [predicted class, true class], classes by ascending category id.

    The last row counts missed objects, the last column detections on background; its corner stays 0. ground_truth: in
    COCO form. In each image each detection, best first, is matched with the unmatched object of any class that it
    overlaps most (at equal overlap, one of its own class). An unmatched detection is not counted if at least `min_iou`
    of its area lies within a crowd; crowds are not counted either.
    """
    order = np.array(sorted(category["id"] for category in ground_truth["categories"]), np.int64)
    background = len(order)
    measured = {image["id"] for image in ground_truth["images"]} if image_ids is None else set(image_ids)
    gt_rows = ground_truth["annotations"]
    is_crowd = np.array([bool(row.get("iscrowd", 0)) for row in gt_rows], bool)
    gt_boxes = _corners(np.array([row["bbox"] for row in gt_rows], np.float64).reshape(-1, 4))
    gt_classes = np.searchsorted(order, np.array([row["category_id"] for row in gt_rows], np.int64))
    gt_of = _by_image(np.array([row["image_id"] for row in gt_rows], np.int64))
    found = results.where(np.flatnonzero(results.scores >= min_score))
    found = found.where(np.argsort(-found.scores, kind="stable"))
    classes, found_in = np.searchsorted(order, found.category_ids), _by_image(found.image_ids)

    matrix = np.zeros((background + 1, background + 1), np.int64)
    nothing = np.zeros(0, np.int64)
    for image_id in measured & (gt_of.keys() | found_in.keys()):
        here, detections = gt_of.get(image_id, nothing), found_in.get(image_id, nothing)
        objects, crowds = here[~is_crowd[here]], here[is_crowd[here]]
        boxes = _corners(found.bboxes[detections])
        same_class = classes[detections][:, None] == gt_classes[objects]
        matched = _match(box_iou(boxes, gt_boxes[objects]).numpy(), same_class, min_iou)
        true = np.append(gt_classes[objects], background)[matched]  # -1 is the last one
        counted = (matched >= 0) | ~(share_inside(boxes, gt_boxes[crowds]) >= min_iou).any(1).numpy()
        np.add.at(matrix, (classes[detections][counted], true[counted]), 1)
        missed = np.delete(gt_classes[objects], matched[matched >= 0])
        matrix[background] += np.bincount(missed, minlength=background + 1)
    return matrix


def _match(ious: np.ndarray, same_class: np.ndarray, min_iou: float) -> np.ndarray:
    """Match detections with objects from ious and same_class (D, M), best detection first: indices (D,), or -1."""
    matched = np.full(len(ious), -1)
    unmatched = np.ones(ious.shape[1], bool)
    for number, (overlaps, same) in enumerate(zip(ious, same_class, strict=True)):
        candidates = np.flatnonzero(unmatched & (overlaps >= min_iou))
        if candidates.size:
            best = int(max(candidates, key=lambda position: (overlaps[position], same[position])))
            unmatched[best] = False
            matched[number] = best
    return matched


def _by_image(image_ids: np.ndarray) -> dict[int, np.ndarray]:
    """Return image id -> its positions in image_ids, ascending."""
    order = np.argsort(image_ids, kind="stable")
    ids, starts = np.unique(image_ids[order], return_index=True)
    return dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=False))


def _corners(xywh: np.ndarray) -> Tensor:
    """(M, 4) xywh -> (M, 4) xyxy"""
    return torch.from_numpy(np.hstack((xywh[:, :2], xywh[:, :2] + xywh[:, 2:])))
