"""What a Python program is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from models.found import Found
from utils.draw import draw_boxes, write_png
from utils.errors import UserError

IMAGE = np.full((40, 60, 3), 200, np.uint8)
NOTHING = np.zeros((0, 4), np.float32)


def found_in(source: object = IMAGE, boxes: object = ((1, 2, 30, 20), (5, 5, 9.5, 8))) -> Found:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    scores, labels = np.array([0.75, 0.5], np.float32)[: len(boxes)], np.array([2, 0])[: len(boxes)]
    return Found(boxes=boxes, scores=scores, labels=labels, class_names=("cat", "bird", "dog"), source=source)  # type: ignore[arg-type]


def test_objects_come_best_first_with_their_names() -> None:
    found = found_in()
    assert len(found) == 2 and found.names == ["dog", "cat"]
    assert list(found) == [("dog", 0.75, (1, 2, 30, 20)), ("cat", 0.5, (5, 5, 9.5, 8))]
    assert repr(found) == "Found(1 dog, 1 cat)"
    assert str(found).splitlines()[0] == "dog 0.75 at [1, 2, 30, 20]"


def test_a_plot_is_a_drawn_copy(tmp_path: Path) -> None:
    before, drawn = IMAGE.copy(), found_in().plot()
    np.testing.assert_array_equal(IMAGE, before)
    np.testing.assert_array_equal(drawn, draw_boxes(IMAGE, found_in().boxes, [2, 0], ("cat", "", "dog"), [0.75, 0.5]))
    assert (drawn != IMAGE).any()
    write_png(tmp_path / "a.png", IMAGE)
    of_file = found_in(tmp_path / "a.png")
    np.testing.assert_array_equal(of_file.plot(), drawn)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png: no such image"):
        of_file.plot()


def test_coco_has_corner_and_sides() -> None:
    rows = found_in().to_coco(7)
    assert json.loads(json.dumps(rows)) == [
        {"image_id": 7, "category_id": 3, "bbox": [1, 2, 29, 18], "score": 0.75},
        {"image_id": 7, "category_id": 1, "bbox": [5, 5, 4.5, 3], "score": 0.5},
    ]
    assert [row["category_id"] for row in found_in().to_coco(7, {"dog": 18, "owl": 1})] == [18]


def test_supervision_takes_it() -> None:
    supervision = pytest.importorskip("supervision")
    taken = found_in().to_supervision()
    assert isinstance(taken, supervision.Detections) and len(taken) == 2
    np.testing.assert_array_equal(taken.xyxy, found_in().boxes)
    np.testing.assert_array_equal(taken.confidence, found_in().scores)
    assert taken.class_id.tolist() == [2, 0] and taken.data["class_name"].tolist() == ["dog", "cat"]
    assert len(found_in(boxes=NOTHING).to_supervision()) == 0


def test_nothing_is_found() -> None:
    found = found_in(boxes=NOTHING)
    assert len(found) == 0 and list(found) == [] and found.to_coco(1) == [] and not found
    assert repr(found) == "Found(nothing)" and str(found) == ""
    np.testing.assert_array_equal(found.plot(), IMAGE)


def test_without_supervision_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"^supervision is not installed: run `pip install supervision`$"):
        found_in().to_supervision()
