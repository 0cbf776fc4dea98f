"""COCO average precision (Lin et al. 2014, arXiv:1405.0312), as pycocotools computes it.

Ground truth is a dictionary in COCO's instances form (`images`, `annotations`, `categories`), results are in
COCO's results form (`CocoResults`), so every data set format is measured by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evaluation.best_thresholds import best_thresholds
from evaluation.bootstrap import Interval, drawn_AP, interval
from evaluation.coco_backends import coco_dataset, run_coco_eval
from evaluation.coco_results import CocoResults
from evaluation.matches import Matches, mean_AP
from models.thresholds import Threshold, Thresholds

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRow:
    """One category. images and boxes count the ground truth without crowds; AP is -1 without any.

    interval: of AP, 95 %, where it was computed.
    """

    category_id: int
    name: str
    images: int
    boxes: int
    AP: float
    AP50: float
    interval: Interval | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CocoTable:
    """COCO's numbers, and rows and curves by class.

    stats: the twelve numbers in 0..1 by name, in COCO's order; -1 without ground truth. classes: by ascending id.
    precision: (101, C) at IoU 0.5, all areas, `max_detections` per image and class, at the recalls 0, 0.01 ... 1; -1
    throughout the column of a class without boxes. beyond: the table with more detections than COCO's 100. matches, the
    95 % interval of AP and the best thresholds: where `with_matches` computed them.
    """

    stats: dict[str, float]
    classes: tuple[ClassRow, ...]
    precision: np.ndarray
    max_detections: int = COCO_DETECTIONS
    beyond: CocoTable | None = None
    matches: Matches | None = None
    interval: Interval | None = None
    thresholds: Thresholds | None = None

    @property
    def AP(self) -> float:
        return self.stats["AP"]

    @property
    def AP50(self) -> float:
        return self.stats["AP50"]

    def with_matches(self, matches: Matches) -> CocoTable:
        """Return the table with intervals and thresholds, which take seconds where there are many images.

        Where a single image has objects, nothing is known of others: there is no interval.
        """
        (drawn,) = drawn_AP(matches)
        classes = (
            replace(row, interval=_within_shares(interval(row.AP, drawn[:, k])) if row.images > 1 else None)
            for k, row in enumerate(self.classes)
        )
        return replace(
            self,
            classes=tuple(classes),
            matches=matches,
            interval=_within_shares(interval(self.AP, mean_AP(drawn))) if matches.images_with_objects > 1 else None,
            thresholds=best_thresholds([matches]),
        )

    def words(self) -> str:
        """Return such as "AP 30.0  AP50 50.0", in per cent."""
        return f"AP {per_cent(self.AP)}  AP50 {per_cent(self.AP50)}"

    def metrics(self) -> dict[str, Any]:
        """Return the numbers, in 0..1, for metrics.json."""
        thresholds = None if self.thresholds is None else self.thresholds.to_json()
        return {**self.stats, "AP_interval": self.interval, "thresholds": thresholds}

    def summary(self) -> str:
        """Return twelve lines, as `COCOeval.summarize` prints them, but in per cent; with the interval of AP."""
        lines = []
        for name, (iou, area, detections) in _conditions(self.max_detections).items():
            title = "Average Precision" if name.startswith("AP") else "Average Recall"
            where = f"IoU={iou:<9} | area={area:>6} | maxDets={detections:>3}"
            lines.append(f" {title:<18} ({name[:2]}) @[ {where} ] = {per_cent(self.stats[name])}")
        if self.interval is not None:
            lines[0] += f" {interval_text(self.interval)}"
        return "\n".join(lines)

    def text(self) -> str:
        """Return all tables."""
        tables = [self.summary(), self.class_table()]
        if self.beyond is not None:
            tables += [f"with {self.beyond.max_detections} detections per image in place of COCO's 100:"]
            tables += [self.beyond.summary(), self.beyond.class_table()]
        return "\n\n".join(tables)

    def class_table(self) -> str:
        """Return an aligned table of the classes that have boxes, in per cent but for the confidences.

        Below, the best threshold for all classes in common.
        """
        rows = [row for row in self.classes if row.boxes]
        table = [["class", "images", "boxes", "AP", "AP50"]]
        table += [[row.name, str(row.images), str(row.boxes), per_cent(row.AP), per_cent(row.AP50)] for row in rows]
        if self.interval is not None:
            intervals = (interval_text(row.interval) if row.interval else "" for row in rows)
            for cells, text in zip(table, ("95 % interval", *intervals), strict=True):
                cells.insert(4, text)
        if self.thresholds is not None:
            table[0] += ["confidence", "precision", "recall"]
            for cells, row in zip(table[1:], rows, strict=True):
                cells += _threshold_cells(self.thresholds.classes[row.name])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip() for cells in table
        ]
        if self.thresholds is not None:
            confidence, precision, recall = _threshold_cells(self.thresholds.common)
            lines += ["", "confidence: the best by F1 at IoU 0.5, with its precision and recall; one for all classes:"]
            lines += [f"{confidence}, with precision {precision} and recall {recall}"]
        return "\n".join(lines)


def per_cent(share: float) -> str:
    """0.4312 -> "43.1"; COCO's -1, without ground truth, -> "-"."""
    return f"{100 * share:.1f}" if share > -1 else "-"


def _within_shares(interval: Interval | None) -> Interval | None:
    """Cut an interval to 0..1: around a small AP it may reach below 0."""
    return None if interval is None else (max(0.0, interval[0]), min(1.0, interval[1]))


def interval_text(interval: Interval) -> str:
    """(0.4, 0.451) -> "[40.0, 45.1]"."""
    low, high = interval
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _threshold_cells(threshold: Threshold) -> list[str]:
    return [f"{threshold.confidence:.3f}", per_cent(threshold.precision), per_cent(threshold.recall)]


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
    truth = coco_dataset(ground_truth, ground_truth["annotations"])
    found = coco_dataset(ground_truth, results.rows())
    stats, precision = run_coco_eval(truth, found, measured, backend=backend, max_detections=max_detections)
    precision = precision[:, :, :, 0, 2]  # (IoU, recall, class): all areas, most detections
    return CocoTable(
        stats=dict(zip(_conditions(max_detections), stats.tolist(), strict=True)),
        classes=_class_rows(truth["annotations"], set(measured), dict(sorted(names.items())), precision),
        precision=precision[0],
        max_detections=max_detections,
    )


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
