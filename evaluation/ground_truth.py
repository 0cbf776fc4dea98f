"""ground_truth.json: the images of an evaluation and their objects, beside its detections.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from data.image_set import ImageSet

_KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


def measured_truth(ground_truth: Mapping[str, Any], image_set: ImageSet) -> dict[str, Any]:
    """Return what of a ground truth in COCO form was measured, without masks and keypoints: the images of the set.

    pycocotools can be run on it. An image has its absolute `path`, so that reports can show it; `info` says which data
    set and split it was. So an evaluation stays readable when the data set is gone.
    """
    paths = dict(zip(image_set.ids.tolist(), map(os.fsdecode, image_set.paths), strict=True))
    images = [image for image in ground_truth["images"] if image["id"] in paths]
    images = [{**image, "path": os.path.abspath(paths[image["id"]])} for image in images]
    objects = [
        {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} | {key: row[key] for key in _KEYS if key in row}
        for row in ground_truth["annotations"]
        if row["image_id"] in paths
    ]
    info = {"data": image_set.name, "split": image_set.split, "source": image_set.source}
    return {"info": info, "images": images, "annotations": objects, "categories": ground_truth["categories"]}
