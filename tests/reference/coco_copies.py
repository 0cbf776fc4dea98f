"""Images that are evaluated several times, slowly: a data set in which each copy is an image of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.coco_backends import PYCOCOTOOLS, run_coco_eval

Dataset = Mapping[str, Any]


def copied(dataset: Dataset, image_ids: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
    """image_ids: ascending, with how often each is to be there. Ids count from 1."""
    rows = [
        (new_id, row)
        for new_id, image_id in enumerate((i for i, n in zip(image_ids, counts, strict=True) for _ in range(n)), 1)
        for row in dataset["annotations"]
        if row["image_id"] == image_id
    ]
    annotations = [{**row, "image_id": new_id, "id": number} for number, (new_id, row) in enumerate(rows, 1)]
    return {**dataset, "images": [{"id": new_id} for new_id in range(1, sum(counts) + 1)], "annotations": annotations}


def naive_AP(truth: Dataset, found: Dataset, image_ids: Sequence[int], counts: Sequence[int]) -> float:
    """COCO's AP of these images, -1 without objects. The data sets are in COCO's form, as COCOeval wants them."""
    both = (copy.deepcopy(copied(each, image_ids, counts)) for each in (truth, found))
    stats, _ = run_coco_eval(*both, range(1, sum(counts) + 1), backend=PYCOCOTOOLS)
    return float(stats[0])
