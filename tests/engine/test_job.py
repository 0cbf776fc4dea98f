"""From a command line to a Job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.digits import make_digits
from engine.job import open_sets, parse_job
from utils.errors import UserError


def test_two_lengths_of_training_contradict():
    with pytest.raises(UserError, match="--epochs and --max-steps"):
        parse_job(["--epochs", "2", "--max-steps", "10"])


def test_a_set_without_objects_says_what_was_dropped(tmp_path: Path):
    digits = make_digits(tmp_path / "digits", counts={"train": 2, "val": 1}, hw=(64, 64))
    annotations = digits / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    for row in content["annotations"]:
        row["bbox"][2] = 0
    annotations.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        open_sets({"data": str(digits)})
    nothing, dropped, more = str(caught.value).split("; ")
    assert nothing == f"{digits}: none of the 2 images of 'train' has an object"
    assert dropped.startswith(f"{len(content['annotations'])} boxes without area dropped (first: ")
    assert more == f"python -m data.doctor {digits} has details"
