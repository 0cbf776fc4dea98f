"""Official weights know a part of val2017."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.leakage import leakage_warning
from tests.evaluation.fakes import known_images
from tests.toy_checkpoint import toy_checkpoint

COCO = {"cfg_name": "yolov4", "class_names": tuple(map(str, range(80))), "seen": 32_000_000}


@pytest.mark.parametrize(
    ("fields", "name", "coco_json", "folder", "expected"),
    [
        ({}, "coco", "/coco/annotations/instances_val2017.json", "images", True),
        ({}, "coco", None, "val2017", True),
        ({"cfg_name": "my-yolov4-tiny"}, "val2017", None, "images", True),
        ({}, "coco", "/coco/annotations/instances_val2014.json", "val2014", False),
        ({"class_names": ("a",)}, "val2017", None, "images", False),
        ({"cfg_name": "yolov3"}, "val2017", None, "images", False),
        ({"seen": None}, "val2017", None, "images", False),
    ],
)
def test_official_weights_on_val2017_are_warned_of(tmp_path: Path, fields, name, coco_json, folder, expected):
    images = replace(known_images(tmp_path / folder), name=name, coco_json=coco_json)
    warning = leakage_warning(toy_checkpoint(**{**COCO, **fields}), images)
    assert (warning is not None) == expected
    assert not warning or "trained on a part of val2017" in warning
