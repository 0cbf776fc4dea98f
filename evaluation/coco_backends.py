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

Dataset = Mapping[str, Any]  # COCO's images, annotations (with id, area and iscrowd), categories


def choose_backend(name: str) -> str:
    """Resolve one of BACKENDS to PYCOCOTOOLS or FASTER; auto takes the latter if it is installed.

    Raises UserError if it is requested and not installed.
    """
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if name == FASTER and not installed:
        raise UserError(f"{FASTER} is not installed: run `pip install {FASTER}`, or leave --eval-backend out")
    return FASTER if installed and name != PYCOCOTOOLS else PYCOCOTOOLS


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
