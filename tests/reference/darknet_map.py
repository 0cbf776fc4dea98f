"""darknet's average precision, detection by detection over the whole data set, as `detector map` goes about it."""

from __future__ import annotations

from tests.reference.assignment import Box
from tests.reference.nms import iou

Found = tuple[float, int, Box]  # score, label, box
Truth = tuple[int, Box]


def average_precisions(
    images: list[tuple[list[Found], list[Truth]]], classes: int, *, limit: float, points: int
) -> list[float]:
    """limit: an IoU. points: 0 is the area under the curve."""
    detections = []  # score, label, and which truth of which image it claims
    truths = [0] * classes
    for image, (found, there) in enumerate(images):
        for label, _ in there:
            truths[label] += 1
        for score, label, box in found:
            claim, best = None, 0.0
            for number, (truth_label, truth_box) in enumerate(there):
                overlap = iou(box, truth_box)
                if truth_label == label and overlap > limit and overlap > best:
                    claim, best = (image, number), overlap
            detections.append((score, label, claim))
    detections.sort(key=lambda detection: -detection[0])
    curves: list[list[tuple[float, float]]] = [[] for _ in range(classes)]  # recall and precision at each rank
    right, wrong, taken = [0] * classes, [0] * classes, set()
    for _, label, claim in detections:
        if claim is not None and claim not in taken:
            taken.add(claim)
            right[label] += 1
        else:
            wrong[label] += 1
        for each in range(classes):
            seen = right[each] + wrong[each]
            curves[each].append(
                (right[each] / truths[each] if truths[each] else 0.0, right[each] / seen if seen else 0.0)
            )
    return [area(curve) if points == 0 else sampled(curve, points) for curve in curves]


def area(curve: list[tuple[float, float]]) -> float:
    """From the last rank to the first; a rank's own precision counts for the step that leads from it."""
    if not curve:
        return 0.0
    recall, precision = curve[-1]
    total = 0.0
    for earlier, its_precision in reversed(curve[:-1]):
        precision = max(precision, its_precision)
        total += (recall - earlier) * precision
        recall = earlier
    return total + recall * precision


def sampled(curve: list[tuple[float, float]], points: int) -> float:
    best = [
        max([precision for recall, precision in curve if recall >= point / (points - 1)], default=0.0)
        for point in range(points)
    ]
    return sum(best) / points
