"""Target assignment one object and one anchor at a time, and overlaps one pair at a time."""

from __future__ import annotations

Box = tuple[float, float, float, float]


def shape_iou(width: float, height: float, anchor: tuple[float, float]) -> float:
    shared = min(width, anchor[0]) * min(height, anchor[1])
    return shared / (width * height + anchor[0] * anchor[1] - shared)


def assign(
    boxes: list[Box],
    image_index: list[int],
    is_crowd: list[bool],
    *,
    anchors: tuple[tuple[float, float], ...],
    mask: tuple[int, ...],
    iou_thresh: float,
    grid_hw: tuple[int, int],
    stride_px: tuple[float, float],
) -> set[tuple[int, int, int, int, int]]:
    """(image, anchor within the head, row, column, object) of each pair."""
    pairs = set()
    for target, (left, top, right, bottom) in enumerate(boxes):
        if is_crowd[target]:
            continue
        ious = [shape_iou(right - left, bottom - top, anchor) for anchor in anchors]
        best = 0
        for index, iou in enumerate(ious):
            if iou > ious[best]:  # the first one wins a tie
                best = index
        row = min(int((top + bottom) / 2 / stride_px[0]), grid_hw[0] - 1)
        column = min(int((left + right) / 2 / stride_px[1]), grid_hw[1] - 1)
        for position, index in enumerate(mask):
            if index == best or ious[index] > iou_thresh:
                pairs.add((image_index[target], position, row, column, target))
    return pairs


def intersection(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def best_overlap(box: Box, image: int, boxes: list[Box], image_index: list[int], is_crowd: list[bool]) -> float:
    """Return the best IoU of one prediction in `image` with an object, or its largest share inside a crowd region."""
    best = 0.0
    for other, other_image, crowd in zip(boxes, image_index, is_crowd, strict=True):
        if other_image != image:
            continue
        shared = intersection(box, other)
        whole = area(box) if crowd else area(box) + area(other) - shared
        best = max(best, shared / whole)
    return best
