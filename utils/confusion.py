"""Which class is taken for which: a confusion matrix over detections, with a background row and column."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def confusion_matrix(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    image_ids: Sequence[int] | None = None,
    min_iou: float = 0.5,
    min_score: float = 0.25,
) -> np.ndarray:
    """Counts, (C + 1, C + 1) int64: [predicted class, true class], classes by ascending category id.

    The last row counts missed objects, the last column detections on background; its corner stays 0. Both
    arguments are in COCO form. In each image the detections, best first, take the free object of any class
    that they overlap most (at equal overlap, one of their own class). A detection that takes none, but lies
    to at least `min_iou` of its own area within a crowd, is not counted, and neither are crowds.
    """
    order = sorted(category["id"] for category in ground_truth["categories"])
    index = {category_id: position for position, category_id in enumerate(order)}
    background = len(index)
    measured = {image["id"] for image in ground_truth["images"]} if image_ids is None else set(image_ids)
    truths = _by_image(ground_truth["annotations"])
    found = _by_image([row for row in results if row["score"] >= min_score])

    matrix = np.zeros((background + 1, background + 1), np.int64)
    for image_id in measured:
        objects = [row for row in truths[image_id] if not row.get("iscrowd", 0)]
        crowds = [row for row in truths[image_id] if row.get("iscrowd", 0)]
        detections = sorted(found[image_id], key=lambda row: -row["score"])
        taken, in_crowd = _match(objects, crowds, detections, min_iou)
        for detection, position, ignored in zip(detections, taken, in_crowd, strict=True):
            truth = index[objects[position]["category_id"]] if position >= 0 else background
            if position >= 0 or not ignored:
                matrix[index[detection["category_id"]], truth] += 1
        for position in set(range(len(objects))) - set(taken):
            matrix[background, index[objects[position]["category_id"]]] += 1
    return matrix


def _match(
    objects: list[Mapping[str, Any]],
    crowds: list[Mapping[str, Any]],
    detections: list[Mapping[str, Any]],
    min_iou: float,
) -> tuple[list[int], list[bool]]:
    """For each detection: the position of the object it takes, or -1; and whether it lies within a crowd."""
    boxes = _xywh(detections)
    shared = _intersections(boxes, _xywh(objects))
    unions = _areas(boxes)[:, None] + _areas(_xywh(objects))[None] - shared
    ious = shared / np.maximum(unions, np.finfo(np.float64).tiny)
    same_class = np.array(
        [[row["category_id"] == other["category_id"] for other in objects] for row in detections], bool
    ).reshape(ious.shape)

    taken: list[int] = []
    free = np.ones(len(objects), bool)
    for overlaps, same in zip(ious, same_class, strict=True):
        candidates = np.flatnonzero(free & (overlaps >= min_iou))
        if candidates.size:
            best = int(max(candidates, key=lambda position: (overlaps[position], same[position])))
            free[best] = False
            taken.append(best)
        else:
            taken.append(-1)

    within = _intersections(boxes, _xywh(crowds)).max(axis=1, initial=0)
    in_crowd = within >= min_iou * np.maximum(_areas(boxes), np.finfo(np.float64).tiny)
    return taken, in_crowd.tolist()


def _by_image(rows: Sequence[Mapping[str, Any]]) -> defaultdict[int, list[Mapping[str, Any]]]:
    grouped: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row["image_id"]].append(row)
    return grouped


def _xywh(rows: list[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)


def _areas(xywh: np.ndarray) -> np.ndarray:
    return xywh[:, 2] * xywh[:, 3]


def _intersections(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(M, 4) and (N, 4) xywh -> (M, N) shared areas."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, :2] + first[:, None, 2:], second[None, :, :2] + second[None, :, 2:])
    return (high - low).clip(0).prod(axis=2)
