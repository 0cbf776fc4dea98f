"""COCOeval, two implementations: pycocotools', the source of truth, and faster-coco-eval's, several times as fast.

Both give the same twelve numbers and the same precision array, to the last bit.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.errors import UserError

PYCOCOTOOLS, FASTER = "pycocotools", "faster-coco-eval"
BACKENDS = ("auto", PYCOCOTOOLS, FASTER)

Dataset = Mapping[str, Any]  # COCO's images, annotations (with id, area and iscrowd), categories


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """stats: (12,), COCO's twelve numbers. precision: (T, R, C, A, M) by IoU, recall, category (ascending id), area
    and number of detections, as COCOeval has it; -1 where there is nothing to find."""

    stats: np.ndarray
    precision: np.ndarray


def choose_backend(asked: str) -> str:
    """One of BACKENDS -> PYCOCOTOOLS or FASTER; auto takes the latter where it is installed.

    UserError where it is asked for and not installed.
    """
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if asked == FASTER and not installed:
        raise UserError(f"{FASTER} is not installed: run `pip install {FASTER}`, or leave --eval-backend out")
    return FASTER if installed and asked != PYCOCOTOOLS else PYCOCOTOOLS


def run_coco_eval(truth: Dataset, found: Dataset, image_ids: Sequence[int], *, backend: str) -> Measured:
    """Boxes of `found`, whose annotations have a score, against `truth`'s; COCOeval writes into their annotations.

    backend: of BACKENDS.
    """
    measure = _measure_faster if choose_backend(backend) == FASTER else _measure
    with contextlib.redirect_stdout(io.StringIO()):
        return measure(truth, found, list(image_ids))


def _measure(truth: Dataset, found: Dataset, image_ids: list[int]) -> Measured:
    evaluation = COCOeval(_index(COCO(), truth), _index(COCO(), found), "bbox")
    evaluation.params.imgIds = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return Measured(stats=np.array(evaluation.stats), precision=evaluation.eval["precision"])


def _measure_faster(truth: Dataset, found: Dataset, image_ids: list[int]) -> Measured:
    """faster-coco-eval, with the one thing put back that it leaves out.

    COCOeval's precision is tp / (tp + fp + np.spacing(1)). That changes a single value: of the first detection that
    counts, where it is right, 1 becomes 1 - 2**-52. It is seen in the curve (its values of 1) unless the second
    detection is right, too; whether it is, says the precision at any recall above that of one object and up to that
    of two. Among n objects there is exactly one power of two between 1 / n and 2 / n: those are asked for as well.
    """
    faster = importlib.import_module("faster_coco_eval")
    evaluation = faster.COCOeval_faster(_index(faster.COCO(), truth), _index(faster.COCO(), found), "bbox")
    params = evaluation.params
    params.imgIds, recalls = image_ids, params.recThrs
    objects = _objects(truth, image_ids, params.catIds, params.areaRng)
    halvings = np.frexp(objects.clip(1) - 1)[1]  # 2 / n >= 2 ** (1 - halvings) > 1 / n
    params.recThrs = np.concatenate([recalls, 2.0 ** (1 - np.arange(halvings.max(initial=0) + 1))])
    evaluation.evaluate()
    evaluation.accumulate()

    params.recThrs = recalls
    asked = evaluation.eval["precision"]
    category, area = np.indices(objects.shape)
    of_second = asked[:, len(recalls) + halvings, category, area]  # (T, C, A, M)
    precision = np.ascontiguousarray(asked[:, : len(recalls)])
    precision[(precision == 1) & (of_second < 1)[:, None]] = 1 / (1 + np.spacing(1))
    evaluation.eval["precision"] = precision
    evaluation.summarize()
    return Measured(stats=np.array(evaluation.stats), precision=precision)


def _objects(truth: Dataset, image_ids: list[int], category_ids: list[int], areas: list[list[float]]) -> np.ndarray:
    """(C, A) int64: how many objects, crowds excluded, there are to find."""
    measured = set(image_ids)
    rows = [row for row in truth["annotations"] if not row["iscrowd"] and row["image_id"] in measured]
    category = np.array([row["category_id"] for row in rows], np.int64)[:, None]
    area = np.array([row["area"] for row in rows], np.float64)
    of_category = category == np.array(category_ids, np.int64)  # (rows, C)
    within = np.stack([(low <= area) & (area <= high) for low, high in areas], axis=1)  # (rows, A)
    return of_category.T.astype(np.int64) @ within.astype(np.int64)


def _index(coco: Any, dataset: Dataset) -> Any:
    coco.dataset = dict(dataset)
    coco.createIndex()
    return coco
