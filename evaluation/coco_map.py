"""COCO average precision (Lin et al. 2014, arXiv:1405.0312), as pycocotools computes it.

Ground truth is a dictionary in COCO's instances form (`images`, `annotations`, `categories`), results are in
COCO's results form (`CocoResults`), so every data set format is measured by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.coco_backends import run_coco_eval
from evaluation.coco_results import CocoResults

COCO_DETECTIONS = 100  # of an image and class, that COCO counts


def _conditions(most: int) -> dict[str, tuple[str, str, int]]:
    """Return the twelve numbers in COCO's order, with the IoU, area and detections per image behind each."""
    return {
        "AP": ("0.50:0.95", "all", most),
        "AP50": ("0.50", "all", most),
        "AP75": ("0.75", "all", most),
        "AP_S": ("0.50:0.95", "small", most),
        "AP_M": ("0.50:0.95", "medium", most),
        "AP_L": ("0.50:0.95", "large", most),
        "AR_1": ("0.50:0.95", "all", 1),
        "AR_10": ("0.50:0.95", "all", 10),
        f"AR_{most}": ("0.50:0.95", "all", most),
        "AR_S": ("0.50:0.95", "small", most),
        "AR_M": ("0.50:0.95", "medium", most),
        "AR_L": ("0.50:0.95", "large", most),
    }


_READ_KEYS = ("image_id", "category_id", "bbox", "area", "iscrowd", "score")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRow:
    """One category. images and boxes count the ground truth without crowds; AP is -1 without any."""

    category_id: int
    name: str
    images: int
    boxes: int
    AP: float
    AP50: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CocoTable:
    """COCO's numbers, and rows and curves by class.

    stats: the twelve numbers in 0..1 by name, in COCO's order; -1 without ground truth. classes: by ascending id.
    precision: (101, C) at IoU 0.5, all areas, `max_detections` per image and class, at the recalls 0, 0.01 ... 1; -1
    throughout the column of a class without boxes. beyond: the table with more detections than COCO's 100.
    """

    stats: dict[str, float]
    classes: tuple[ClassRow, ...]
    precision: np.ndarray
    max_detections: int = COCO_DETECTIONS
    beyond: CocoTable | None = None

    @property
    def AP(self) -> float:
        return self.stats["AP"]

    @property
    def AP50(self) -> float:
        return self.stats["AP50"]

    def words(self) -> str:
        """Return such as "AP 0.300  AP50 0.500"."""
        return f"AP {self.AP:.3f}  AP50 {self.AP50:.3f}"

    def summary(self) -> str:
        """Return twelve lines, exactly as `COCOeval.summarize` prints them."""
        lines = []
        for name, (iou, area, detections) in _conditions(self.max_detections).items():
            title = "Average Precision" if name.startswith("AP") else "Average Recall"
            where = f"IoU={iou:<9} | area={area:>6} | maxDets={detections:>3}"
            lines.append(f" {title:<18} ({name[:2]}) @[ {where} ] = {self.stats[name]:0.3f}")
        return "\n".join(lines)

    def text(self) -> str:
        """Return all tables."""
        tables = [self.summary(), self.class_table()]
        if self.beyond is not None:
            tables += [f"with {self.beyond.max_detections} detections per image in place of COCO's 100:"]
            tables += [self.beyond.summary(), self.beyond.class_table()]
        return "\n\n".join(tables)

    def class_table(self) -> str:
        """Return an aligned table of the classes that have boxes."""
        rows = [row for row in self.classes if row.boxes]
        width = max([len("class"), *(len(row.name) for row in rows)])
        lines = [f"{'class':<{width}}  images   boxes     AP   AP50"]
        lines += [
            f"{row.name:<{width}}  {row.images:>6d}  {row.boxes:>6d}  {row.AP:>5.3f}  {row.AP50:>5.3f}" for row in rows
        ]
        return "\n".join(lines)


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    results: CocoResults,
    *,
    image_ids: Sequence[int] | None = None,
    backend: str = "auto",
    max_detections: int = COCO_DETECTIONS,
) -> CocoTable:
    """Compute the AP of results on all images of the ground truth or on `image_ids`; mutates neither.

    An annotation may lack `area` (then width x height) and `iscrowd` (then 0). Results outside `image_ids` are left
    out. backend: of `coco_backends.BACKENDS`. max_detections: of an image and class, the best of which count.
    """
    measured = [image["id"] for image in ground_truth["images"]] if image_ids is None else list(image_ids)
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    truth = _dataset(ground_truth, ground_truth["annotations"])
    found = _dataset(ground_truth, results.rows())
    stats, precision = run_coco_eval(truth, found, measured, backend=backend, max_detections=max_detections)
    precision = precision[:, :, :, 0, 2]  # (IoU, recall, class): all areas, most detections
    return CocoTable(
        stats=dict(zip(_conditions(max_detections), stats.tolist(), strict=True)),
        classes=_class_rows(truth["annotations"], set(measured), dict(sorted(names.items())), precision),
        precision=precision[0],
        max_detections=max_detections,
    )


def _dataset(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a copy that COCOeval may write into. Ids count from 1: COCOeval takes a match with id 0 for no match."""
    return {
        "images": [{"id": image["id"]} for image in ground_truth["images"]],
        "categories": [dict(category) for category in ground_truth["categories"]],
        "annotations": [
            {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
            | {key: row[key] for key in _READ_KEYS if key in row}
            | {"id": number}
            for number, row in enumerate(rows, start=1)
        ],
    }


def _class_rows(
    annotations: list[dict[str, Any]], image_ids: set[int], names: Mapping[int, str], precision: np.ndarray
) -> tuple[ClassRow, ...]:
    """names: category id -> name, by ascending id. precision: (IoU, recall, class)."""
    images_of: dict[int, list[int]] = {category_id: [] for category_id in names}
    for row in annotations:
        if not row["iscrowd"] and row["image_id"] in image_ids:
            images_of[row["category_id"]].append(row["image_id"])
    return tuple(
        ClassRow(
            category_id=category_id,
            name=name,
            images=len(set(images_of[category_id])),
            boxes=len(images_of[category_id]),
            AP=_mean_known(precision[:, :, column]),
            AP50=_mean_known(precision[0, :, column]),
        )
        for column, (category_id, name) in enumerate(names.items())
    )


def _mean_known(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0
