"""Threshold, greedy suppression within each class, the best K: one box after the other."""

from __future__ import annotations

from tests.reference.assignment import Box, area, intersection

Found = tuple[float, int, Box]  # score, label, box


def best_of_image(
    boxes: list[Box],
    scores: list[list[float]],
    *,
    confidence: float,
    nms_iou: float,
    max_detections: int | None,
    kind: str = "default",
    beta: float = 0.6,
    unit: tuple[float, float] = (1.0, 1.0),
) -> list[Found]:
    """scores: one row a box, one column a class. Best first."""
    kept: list[Found] = []
    for label in range(len(scores[0])):
        candidates = [(row[label], label, box) for row, box in zip(scores, boxes, strict=True)]
        candidates = sorted((c for c in candidates if c[0] > confidence), key=lambda c: -c[0])
        of_class: list[Found] = []
        for candidate in candidates:
            if all(overlap(candidate[2], other[2], kind, beta, unit) <= nms_iou for other in of_class):
                of_class.append(candidate)
        kept += of_class
    return sorted(kept, key=lambda c: -c[0])[:max_detections]


def overlap(a: Box, b: Box, kind: str, beta: float = 0.6, unit: tuple[float, float] = (1.0, 1.0)) -> float:
    """What a kind of NMS compares with its threshold; distances in `unit`."""
    if kind == "default":
        return iou(a, b)
    (width, height), beta = unit, 0.6 if kind == "greedynms" else beta
    distance = (((a[0] + a[2] - b[0] - b[2]) / 2 / width) ** 2) + (((a[1] + a[3] - b[1] - b[3]) / 2 / height) ** 2)
    around = ((max(a[2], b[2]) - min(a[0], b[0])) / width) ** 2 + ((max(a[3], b[3]) - min(a[1], b[1])) / height) ** 2
    return iou(a, b) if around == 0 else iou(a, b) - (distance / around) ** beta


def iou(a: Box, b: Box) -> float:
    shared = intersection(a, b)
    return shared / (area(a) + area(b) - shared) if shared else 0.0
