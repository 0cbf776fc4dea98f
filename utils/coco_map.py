"""COCO average precision (Lin et al. 2014, arXiv:1405.0312). pycocotools is the one source of truth.

Ground truth is a dictionary in COCO's instances form (`images`, `annotations`, `categories`), results are
rows in COCO's results form (`image_id`, `category_id`, `bbox` as x, y, width, height in source pixels,
`score`), so every data set format is measured by the same program.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.structures import Detections, Placement

_CONDITIONS = {  # the twelve numbers in COCO's order, with the IoU, area and detections per image behind each
    "AP": ("0.50:0.95", "all", 100),
    "AP50": ("0.50", "all", 100),
    "AP75": ("0.75", "all", 100),
    "AP_S": ("0.50:0.95", "small", 100),
    "AP_M": ("0.50:0.95", "medium", 100),
    "AP_L": ("0.50:0.95", "large", 100),
    "AR_1": ("0.50:0.95", "all", 1),
    "AR_10": ("0.50:0.95", "all", 10),
    "AR_100": ("0.50:0.95", "all", 100),
    "AR_S": ("0.50:0.95", "small", 100),
    "AR_M": ("0.50:0.95", "medium", 100),
    "AR_L": ("0.50:0.95", "large", 100),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRow:
    """One category. images and boxes count what is to be found (crowds excluded); AP is -1 without any."""

    category_id: int
    name: str
    images: int
    boxes: int
    AP: float
    AP50: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CocoTable:
    """The twelve COCO numbers in 0..1, each -1 where there is nothing to find; and what lies behind them.

    classes: one row per category, by ascending id. precision: (101, C) at IoU 0.5, all areas, 100 detections
    per image, at the recalls 0, 0.01 ... 1; -1 throughout the column of a class without boxes.
    """

    AP: float
    AP50: float
    AP75: float
    AP_S: float
    AP_M: float
    AP_L: float
    AR_1: float
    AR_10: float
    AR_100: float
    AR_S: float
    AR_M: float
    AR_L: float
    classes: tuple[ClassRow, ...]
    precision: np.ndarray

    def stats(self) -> dict[str, float]:
        """The twelve numbers by name, in COCO's order."""
        return {name: getattr(self, name) for name in _CONDITIONS}

    def summary(self) -> str:
        """Twelve lines, to the letter as `COCOeval.summarize` prints them."""
        lines = []
        for name, (iou, area, detections) in _CONDITIONS.items():
            title = "Average Precision" if name.startswith("AP") else "Average Recall"
            where = f"IoU={iou:<9} | area={area:>6} | maxDets={detections:>3}"
            lines.append(f" {title:<18} ({name[:2]}) @[ {where} ] = {getattr(self, name):0.3f}")
        return "\n".join(lines)

    def class_table(self) -> str:
        """An aligned table of the classes that have boxes."""
        rows = [row for row in self.classes if row.boxes]
        width = max([len("class"), *(len(row.name) for row in rows)])
        lines = [f"{'class':<{width}}  images   boxes     AP   AP50"]
        lines += [
            f"{row.name:<{width}}  {row.images:>6d}  {row.boxes:>6d}  {row.AP:>5.3f}  {row.AP50:>5.3f}" for row in rows
        ]
        return "\n".join(lines)


def results_of(
    detections: Detections,
    placement: Placement,
    image_id: int,
    category_ids: Mapping[int, int] | Sequence[int],
) -> list[dict[str, Any]]:
    """One picture's detections (input pixels) as COCO result rows (source pixels), in the same order.

    category_ids maps a label to the data set's category id. Numbers are rounded to 1e-3 px and 1e-6 score,
    which halves the file; evaluate these rows, and the saved file gives the same AP. A box that lies wholly
    outside the source picture, in the letterbox's border, holds no source pixel and yields no row.
    """
    found = detections.cpu()
    boxes = placement.to_source(found.boxes.detach().double().numpy())
    sizes = boxes[:, 2:] - boxes[:, :2]
    bboxes = np.concatenate([boxes[:, :2], sizes], axis=1).round(3)
    return [
        {
            "image_id": int(image_id),
            "category_id": int(category_ids[label]),
            "bbox": bbox,
            "score": round(score, 6),
        }
        for bbox, score, label in zip(bboxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        if bbox[2] > 0 and bbox[3] > 0
    ]


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    image_ids: Sequence[int] | None = None,
) -> CocoTable:
    """Measure results against ground truth, on all its images or on `image_ids`; mutates neither.

    An annotation may lack `area` (then width x height) and `iscrowd` (then 0). Results outside `image_ids`
    are left out. Raises ValueError for an image id, or the category id of a result, which the ground truth
    does not have.
    """
    known = {image["id"] for image in ground_truth["images"]}
    _require_known("image", known, [*(image_ids or ()), *(row["image_id"] for row in results)])
    categories = {category["id"] for category in ground_truth["categories"]}
    _require_known("category", categories, [row["category_id"] for row in results])

    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(ground_truth, ground_truth["annotations"])
        evaluation = COCOeval(truth, _coco(ground_truth, results), "bbox")
        evaluation.params.maxDets = [1, 10, 100]
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # (IoU, recall, class): all areas, 100 detections
    measured = known if image_ids is None else set(image_ids)
    return CocoTable(
        **{name: float(value) for name, value in zip(_CONDITIONS, evaluation.stats, strict=True)},
        classes=_class_rows(truth, measured, list(evaluation.params.catIds), precision),
        precision=precision[0],
    )


def _require_known(what: str, known: set[int], asked: Sequence[int]) -> None:
    strangers = sorted(set(asked) - known)
    if strangers:
        raise ValueError(f"{what} id {strangers[0]} is not in the ground truth ({len(strangers)} unknown)")


def _coco(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> COCO:
    """An index over fresh copies of the rows, as COCOeval writes into them.

    Rows are numbered from 1, because COCOeval takes a match with annotation 0 for no match.
    """
    coco = COCO()
    coco.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": [
            {
                "id": number,
                "image_id": row["image_id"],
                "category_id": row["category_id"],
                "bbox": list(row["bbox"]),
                "area": row.get("area", row["bbox"][2] * row["bbox"][3]),
                "iscrowd": row.get("iscrowd", 0),
                **({"score": row["score"]} if "score" in row else {}),
            }
            for number, row in enumerate(rows, start=1)
        ],
    }
    coco.createIndex()
    return coco


def _class_rows(
    truth: COCO, image_ids: set[int], category_ids: list[int], precision: np.ndarray
) -> tuple[ClassRow, ...]:
    images_of: dict[int, list[int]] = {category_id: [] for category_id in category_ids}
    for row in truth.dataset["annotations"]:
        if not row["iscrowd"] and row["image_id"] in image_ids:
            images_of[row["category_id"]].append(row["image_id"])
    return tuple(
        ClassRow(
            category_id=category_id,
            name=truth.cats[category_id]["name"],
            images=len(set(images_of[category_id])),
            boxes=len(images_of[category_id]),
            AP=_mean_known(precision[:, :, column]),
            AP50=_mean_known(precision[0, :, column]),
        )
        for column, category_id in enumerate(category_ids)
    )


def _mean_known(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0
