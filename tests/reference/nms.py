"""Threshold, greedy suppression within each class, the best K: one box after the other."""

from __future__ import annotations

from tests.reference.assignment import Box, area, intersection

Found = tuple[float, int, Box]  # score, label, box


def best_of_image(
    boxes: list[Box], scores: list[list[float]], *, confidence: float, nms_iou: float, max_detections: int
) -> list[Found]:
    """scores: one row a box, one column a class. Best first."""
    kept: list[Found] = []
    for label in range(len(scores[0])):
        candidates = [(row[label], label, box) for row, box in zip(scores, boxes, strict=True)]
        candidates = sorted((c for c in candidates if c[0] > confidence), key=lambda c: -c[0])
        of_class: list[Found] = []
        for candidate in candidates:
            if all(iou(candidate[2], other[2]) <= nms_iou for other in of_class):
                of_class.append(candidate)
        kept += of_class
    return sorted(kept, key=lambda c: -c[0])[:max_detections]


def iou(a: Box, b: Box) -> float:
    shared = intersection(a, b)
    return shared / (area(a) + area(b) - shared)
