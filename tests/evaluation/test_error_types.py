"""TIDE's numbers against its authors' program, and cases whose answer can be said beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.coco_map import evaluate_coco
from evaluation.coco_results import CocoResults
from evaluation.error_types import CORRECT, ERROR_TYPES, UNJUDGED, ErrorAnalysis, find_errors
from tests.evaluation.scenes import results_from, scene

OBJECT = [10, 10, 20, 20]
GOLDEN_AP = 0.217378
GOLDEN = {
    "classification": 0.022813,
    "localization": 0.381507,
    "both": 0.007072,
    "duplicate": 0.004087,
    "background": 0.038532,
    "missed": 0.03839,
}


def made_scene(
    objects: list[tuple[Any, ...]], detections: list[tuple[Any, ...]], images: int = 1
) -> tuple[dict[str, Any], CocoResults]:
    """objects: (image, class, box) and maybe whether it is a crowd. detections: (image, class, box, score)."""
    annotations = [
        {"id": number, "image_id": image, "category_id": label, "bbox": box, "iscrowd": int(bool(crowd))}
        for number, (image, label, box, *crowd) in enumerate(objects, start=1)
    ]
    truth = {
        "images": [{"id": number} for number in range(images)],
        "annotations": annotations,
        "categories": [{"id": label, "name": f"{label}"} for label in (1, 2, 3)],
    }
    return truth, results_from(detections)


def types_of(analysis: ErrorAnalysis) -> list[str]:
    names = {CORRECT: "correct", UNJUDGED: "unjudged", **dict(enumerate(ERROR_TYPES))}
    return [names[each] for each in analysis.types.tolist()]


@pytest.mark.parametrize(
    ("box", "label", "kind"),
    [
        (OBJECT, 1, "correct"),
        (OBJECT, 2, "classification"),
        ([20, 10, 20, 20], 1, "localization"),  # IoU 1/3
        ([20, 10, 20, 20], 2, "both"),
        ([60, 60, 20, 20], 1, "background"),
        ([60, 60, 20, 20], 2, "background"),
        ([28, 28, 20, 20], 1, "background"),  # IoU 0.005
    ],
)
def test_a_single_detection_has_the_type_of_its_overlap_and_class(box: list[int], label: int, kind: str) -> None:
    truth, results = made_scene([(0, 1, OBJECT)], [(0, label, box, 0.9)])
    analysis = find_errors(truth, results)
    assert types_of(analysis) == [kind]
    assert analysis.counts["missed"] == (kind in ("both", "background"))
    assert analysis.is_missed.tolist() == [kind in ("both", "background")]


def test_the_second_detection_of_an_object_is_a_duplicate_whatever_their_order() -> None:
    truth, results = made_scene([(0, 1, OBJECT)], [(0, 1, OBJECT, 0.3), (0, 1, OBJECT, 0.8)])
    analysis = find_errors(truth, results)
    assert types_of(analysis) == ["duplicate", "correct"]
    assert analysis.found.tolist() == [-1, 0]


def test_correcting_the_only_error_of_a_type_gives_back_all_that_it_cost() -> None:
    other = [60, 60, 20, 20]
    truth, results = made_scene([(0, 1, OBJECT), (0, 2, other)], [(0, 1, OBJECT, 0.9), (0, 3, other, 0.8)])
    analysis = find_errors(truth, results)
    assert pytest.approx(1 / 3) == analysis.AP  # of class 3 something is detected
    assert analysis.costs["classification"] == pytest.approx(2 / 3)
    assert [analysis.costs[name] for name in ("localization", "duplicate", "missed")] == [0, 0, 0]


def test_an_object_is_corrected_once() -> None:
    truth, results = made_scene([(0, 1, OBJECT)], [(0, 1, [20, 10, 20, 20], 0.9), (0, 2, OBJECT, 0.8)])
    analysis = find_errors(truth, results)
    assert types_of(analysis) == ["localization", "classification"]
    assert analysis.costs["localization"] == pytest.approx(0.5)  # class 2 stays, with an AP of 0
    # The object is the better detection's; the other is taken out, and class 2 with it, but not what is still wrong.
    assert analysis.costs["classification"] == 0


def test_a_detection_in_a_crowd_of_its_class_costs_nothing_and_is_marked() -> None:
    crowd = (0, 1, [50, 50, 40, 40], True)
    truth, results = made_scene(
        [(0, 1, OBJECT), crowd], [(0, 1, OBJECT, 0.5), (0, 1, [60, 60, 10, 10], 0.9), (0, 2, [60, 60, 10, 10], 0.9)]
    )
    analysis = find_errors(truth, results)
    assert analysis.is_ignored.tolist() == [False, True, False]
    assert find_errors(truth, results.where(np.array([0, 1]))).AP == 1


@pytest.mark.parametrize(("objects", "detections"), [([], []), ([], [(0, 1, OBJECT, 0.9)]), ([(0, 1, OBJECT)], [])])
def test_nothing_to_find_or_nothing_found_is_no_problem(objects: list[Any], detections: list[Any]) -> None:
    analysis = find_errors(*made_scene(objects, detections))
    assert analysis.AP == 0
    assert analysis.counts["missed"] == len(objects)
    assert analysis.counts["background"] == len(detections)


def test_only_the_best_detections_of_an_image_are_judged() -> None:
    truth, results = made_scene([(0, 1, OBJECT)], [(0, 1, OBJECT, 0.1), (0, 2, OBJECT, 0.9)])
    assert types_of(find_errors(truth, results, max_detections=1)) == ["unjudged", "classification"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_parts_fit_together(seed: int) -> None:
    truth, results = scene(seed)
    analysis = find_errors(truth, results)
    assert min(analysis.costs.values()) >= 0
    assert sum(analysis.counts[name] for name in ERROR_TYPES[:5]) == (analysis.types >= 0).sum()
    found = analysis.found[analysis.types == CORRECT]
    assert len(set(found.tolist())) == len(found)
    assert not analysis.is_missed[found].any()
    assert (analysis.found[analysis.types != CORRECT] == -1).all()


def test_ap_is_cocos_where_each_class_has_objects() -> None:
    truth, results = scene(3)
    assert {row["category_id"] for row in truth["annotations"]} == {1, 2, 3}
    assert pytest.approx(evaluate_coco(truth, results).AP50, abs=1e-9) == find_errors(truth, results).AP


def test_golden_costs() -> None:
    """The costs are those that tidecv 1.0.1 finds in the same scene, in 0..1."""
    analysis = find_errors(*scene(0, images=12))
    assert {name: round(cost, 6) for name, cost in analysis.costs.items()} == GOLDEN
    assert round(analysis.AP, 6) == GOLDEN_AP


@pytest.mark.parametrize("seed", range(6))
def test_costs_are_tidecvs(seed: int) -> None:
    truth, results = scene(seed, images=20, score_digits=1 + seed % 3)  # with one digit most scores are equal
    assert_as_tidecv(truth, results)


def assert_as_tidecv(truth: dict[str, Any], results: CocoResults) -> None:
    tidecv = pytest.importorskip("tidecv", reason="tidecv, the authors' program, is not installed")
    ours, known = find_errors(truth, results), tidecv.Data("truth")
    for image in truth["images"]:
        known.add_image(image["id"], str(image["id"]))
    for category in truth["categories"]:
        known.add_class(category["id"], category["name"])
    for row in truth["annotations"]:
        add = known.add_ignore_region if row["iscrowd"] else known.add_ground_truth
        add(row["image_id"], row["category_id"], row["bbox"])
    detected = tidecv.Data("found")
    for row in results.rows():
        detected.add_detection(row["image_id"], row["category_id"], row["score"], row["bbox"])
    run = tidecv.TIDE().evaluate(known, detected, mode=tidecv.TIDE.BOX)
    costs = {error.short_name: cost / 100 for error, cost in run.fix_main_errors().items()}
    names = dict(zip(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), ERROR_TYPES, strict=True))
    assert pytest.approx(run.ap / 100, abs=1e-9) == ours.AP
    assert ours.costs == pytest.approx({names[name]: cost for name, cost in costs.items()}, abs=1e-9)
    assert ours.counts == {names[error.short_name]: count for error, count in run.count_errors().items()}
