"""Two implementations of COCOeval: pycocotools', the reference, and faster-coco-eval's, several times as fast.

Both give the same twelve numbers and the same precision array to 1e-12: where pycocotools adds np.spacing(1) to a
denominator, faster-coco-eval does not.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.errors import UserError

PYCOCOTOOLS, FASTER = "pycocotools", "faster-coco-eval"
BACKENDS = ("auto", PYCOCOTOOLS, FASTER)

_READ_KEYS = ("image_id", "category_id", "bbox", "area", "iscrowd", "score")
Dataset = Mapping[str, Any]  # COCO's images, annotations (with id, area and iscrowd), categories


def choose_backend(name: str) -> str:
    """Resolve one of BACKENDS to PYCOCOTOOLS or FASTER; auto takes the latter if it is installed.

    Raises UserError if it is requested and not installed.
    """
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if name == FASTER and not installed:
        raise UserError(f"{FASTER} is not installed: run `pip install {FASTER}`, or leave --eval-backend out")
    return FASTER if installed and name != PYCOCOTOOLS else PYCOCOTOOLS


def coco_dataset(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def run_coco_eval(
    truth: Dataset, found: Dataset, image_ids: Sequence[int], *, backend: str, max_detections: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Match the boxes of `found`, which have a score, with `truth`; COCOeval writes into both. backend: of BACKENDS.

    max_detections: per image and class, the best of which count. Returns COCO's twelve numbers, (12,), and the
    precision, (T, R, C, A, M) by IoU, recall, category (ascending id), area and number of detections; -1 without ground
    truth.
    """
    coco, evaluator = COCO, COCOeval
    if choose_backend(backend) == FASTER:
        faster = importlib.import_module("faster_coco_eval")
        coco, evaluator = faster.COCO, faster.COCOeval_faster
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluator(_index(coco(), truth), _index(coco(), found), "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        if max_detections == 100:
            evaluation.summarize()
    precision = evaluation.eval["precision"]
    if max_detections == 100:
        return np.array(evaluation.stats), precision
    return _stats(precision, evaluation.eval["recall"]), precision


def match_images(truth: Dataset, found: Dataset, image_ids: Sequence[int]) -> list[list[dict[str, Any]]]:
    """Match as `run_coco_eval`, all areas and COCO's 100 detections: COCOeval's results by image, of each category.

    By pycocotools, because faster-coco-eval does not show them. Categories and images ascend by id. COCOeval's None,
    of an image without boxes of the category, becomes a result without boxes.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(COCO(), truth), _index(COCO(), found), "bbox")
        params = evaluation.params
        params.imgIds, params.areaRng, params.areaRngLbl = list(image_ids), params.areaRng[:1], params.areaRngLbl[:1]
        params.maxDets = params.maxDets[-1:]
        evaluation.evaluate()
    none = np.zeros((len(params.iouThrs), 0), bool)
    nothing = {"dtScores": [], "dtMatches": none, "dtIgnore": none, "gtIgnore": none[0]}
    results, images = [result or nothing for result in evaluation.evalImgs], len(params.imgIds)
    return [results[k * images : (k + 1) * images] for k in range(len(params.catIds))]


def _stats(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Return COCO's twelve numbers of (T, R, C, A, M) and (T, C, A, M); `summarize` knows 100 detections only."""
    aps = [precision[..., 0, 2], precision[0, ..., 0, 2], precision[5, ..., 0, 2]]
    aps += [precision[..., area, 2] for area in (1, 2, 3)]
    ars = [recall[..., 0, most] for most in (0, 1, 2)] + [recall[..., area, 2] for area in (1, 2, 3)]
    known = [values[values > -1] for values in (*aps, *ars)]
    return np.array([values.mean() if values.size else -1.0 for values in known])


def _index(coco: Any, dataset: Dataset) -> Any:
    coco.dataset = dict(dataset)
    coco.createIndex()
    return coco
