"""AP from matches against COCOeval: of all images, and of images that are there several times or not at all."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.coco_backends import PYCOCOTOOLS, run_coco_eval
from evaluation.matches import match_coco, mean_AP
from tests.evaluation.test_coco_backends import case
from tests.reference.coco_copies import naive_AP
from tests.reference.coco_rows import results_from


def without_ties_in_an_image(found: dict[str, Any]) -> dict[str, Any]:
    """Scores of different images may still be equal."""
    rows = [{**row, "score": row["score"] - 1e-5 * number} for number, row in enumerate(found["annotations"])]
    first = {row["image_id"]: number for number, row in reversed(list(enumerate(found["annotations"])))}
    for row in rows:
        row["score"] = round(row["score"] + 1e-5 * first[row["image_id"]], 9)
    return {**found, "annotations": rows}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5000))
def test_each_image_once_is_cocos_ap_by_class(seed: int) -> None:
    truth, found, asked = case(seed)
    matches = match_coco(truth, results_from(found["annotations"]), asked)
    stats, precision = run_coco_eval(copy.deepcopy(truth), copy.deepcopy(found), asked, backend=PYCOCOTOOLS)
    AP = matches.AP()
    assert (-1 if np.isnan(AP) else AP) == pytest.approx(stats[0], abs=1e-12)
    for column, own in enumerate(matches.class_AP(np.ones((len(asked), 1), np.int64))[0]):
        known = precision[:, :, column, 0, 2][precision[:, :, column, 0, 2] > -1]
        assert np.isnan(own) == (known.size == 0)
        assert known.size == 0 or own == pytest.approx(known.mean(), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5000), st.data())
def test_copies_of_images_count_as_images(seed: int, data: st.DataObject) -> None:
    truth, found, asked = case(seed)
    found, asked = without_ties_in_an_image(found), sorted(asked)
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(asked), max_size=len(asked)))
    matches = match_coco(truth, results_from(found["annotations"]), asked)
    (AP,) = mean_AP(matches.class_AP(np.array(counts, np.int64).reshape(-1, 1)))
    assert (-1 if np.isnan(AP) else AP) == pytest.approx(naive_AP(truth, found, asked, counts), abs=1e-12)


def test_choices_that_are_computed_together_are_those_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found, asked = case(1)
    matches = match_coco(truth, results_from(found["annotations"]), asked)
    counts = np.random.default_rng(0).integers(0, 4, (len(asked), 37))
    together = matches.class_AP(counts)
    monkeypatch.setattr("evaluation.matches._CELLS", 1)
    np.testing.assert_allclose(matches.class_AP(counts), together, rtol=0, atol=1e-14)


@pytest.mark.parametrize("categories", [[], [{"id": 1, "name": "a"}]])
def test_nothing_is_known_of_no_images(categories: list[dict[str, Any]]) -> None:
    matches = match_coco({"images": [], "annotations": [], "categories": categories}, results_from([]), [])
    assert (matches.images, matches.detections) == (0, 0)
    assert np.isnan(matches.AP())
