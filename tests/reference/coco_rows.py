"""COCO results, row by row: a results file as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.coco_results import CocoResults


def results_from(rows: Sequence[Mapping[str, Any]]) -> CocoResults:
    return CocoResults(
        image_ids=np.array([row["image_id"] for row in rows], np.int64),
        category_ids=np.array([row["category_id"] for row in rows], np.int64),
        bboxes=np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
        scores=np.array([row["score"] for row in rows], np.float64),
    )
