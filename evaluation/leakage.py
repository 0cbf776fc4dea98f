"""Evaluation images that the official YOLOv4 weights were trained on."""

from __future__ import annotations

import os

from data.image_set import ImageSet
from utils.checkpoint import Checkpoint


def leakage_warning(checkpoint: Checkpoint, image_set: ImageSet) -> str | None:
    """Return a warning if `checkpoint` looks like official weights, and `image_set` like COCO's val2017."""
    is_official = checkpoint.is_darknet and "yolov4" in checkpoint.cfg_name and len(checkpoint.class_names) == 80
    places = (image_set.name, image_set.coco_json or "", os.path.dirname(image_set[0].path))
    if not is_official or not any("val2017" in place for place in places):
        return None
    return (
        "official YOLOv4 weights were trained on a part of val2017 (darknet's trainvalno5k holds 35,000 of the "
        "validation images of 2014): AP is too high here"
    )
