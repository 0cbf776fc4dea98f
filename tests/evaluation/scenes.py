"""Objects and detections of them, right and wrong in every way, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.coco_results import CocoResults

CLASSES = 3
SIDE_PX = 200


def scene(seed: int, *, images: int = 5, score_digits: int = 6) -> tuple[dict[str, Any], CocoResults]:
    """Return ground truth in COCO form, and results.

    Objects are found twice, shifted, under another class's name, or not; some are crowds; some images have no object or
    no detection. score_digits: fewer make more scores equal.
    """
    rng = np.random.default_rng(seed)
    objects: list[dict[str, Any]] = []
    detections: list[tuple[Any, ...]] = []
    for image in range(images):
        for _ in range(rng.integers(0, 7)):
            box = np.append(rng.uniform(0, SIDE_PX - 60, 2), rng.uniform(10, 60, 2)).round(1)
            label, is_crowd = int(rng.integers(1, CLASSES + 1)), bool(rng.random() < 0.1)
            objects.append({"image_id": image, "category_id": label, "bbox": box.tolist(), "iscrowd": int(is_crowd)})
            for _ in range(rng.integers(0, 4)):
                moved = box + rng.normal(0, rng.choice([1, 6, 20]), 4)
                other = int(rng.integers(1, CLASSES + 1)) if rng.random() < 0.3 else label
                detections.append((image, other, np.maximum(moved, 1).round(1).tolist(), rng.random()))
        for _ in range(rng.integers(0, 4)):
            box = np.append(rng.uniform(0, SIDE_PX - 60, 2), rng.uniform(10, 60, 2)).round(1)
            detections.append((image, int(rng.integers(1, CLASSES + 1)), box.tolist(), rng.random() * 0.6))
    for number, row in enumerate(objects, start=1):
        row |= {"id": number, "area": row["bbox"][2] * row["bbox"][3]}
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "height": SIDE_PX, "width": SIDE_PX} for n in range(images)],
        "annotations": objects,
        "categories": [{"id": label, "name": f"class {label}"} for label in range(1, CLASSES + 1)],
    }, results_from([(*rest, round(score, score_digits)) for *rest, score in detections])


def results_from(detections: Sequence[tuple[Any, ...]]) -> CocoResults:
    """detections: (image id, category id, xywh, score)."""
    columns = list(zip(*detections, strict=True)) or [(), (), (), ()]
    return CocoResults(
        image_ids=np.array(columns[0], np.int64),
        category_ids=np.array(columns[1], np.int64),
        bboxes=np.array(columns[2], np.float64).reshape(-1, 4),
        scores=np.array(columns[3], np.float64),
    )
