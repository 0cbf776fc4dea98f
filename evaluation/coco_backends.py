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
    truth: Dataset, found: Dataset, image_ids: Sequence[int], *, backend: str
) -> tuple[np.ndarray, np.ndarray]:
    """Match the boxes of `found`, which have a score, with `truth`; COCOeval writes into both. backend: of BACKENDS.

    Returns COCO's twelve numbers, (12,), and the precision, (T, R, C, A, M) by IoU, recall, category (ascending id),
    area and number of detections; -1 without ground truth.
    """
    coco, evaluator = COCO, COCOeval
    if choose_backend(backend) == FASTER:
        faster = importlib.import_module("faster_coco_eval")
        coco, evaluator = faster.COCO, faster.COCOeval_faster
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluator(_index(coco(), truth), _index(coco(), found), "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.array(evaluation.stats), evaluation.eval["precision"]


def _index(coco: Any, dataset: Dataset) -> Any:
    coco.dataset = dict(dataset)
    coco.createIndex()
    return coco
