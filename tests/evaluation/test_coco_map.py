"""evaluate_coco against pycocotools driven by hand, on crowds, all sizes and several classes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.coco_backends import FASTER, PYCOCOTOOLS
from evaluation.coco_map import CocoTable, evaluate_coco
from tests.reference.coco_rows import results_from

Rows = list[dict[str, Any]]


def images(count: int, classes: int, seed: int = 0) -> tuple[dict[str, Any], Rows]:
    """Ground truth and noisy results with missed objects, false alarms and confused classes."""
    random = np.random.default_rng(seed)
    category_ids = [10 * (place + 1) for place in range(classes)]
    annotations: Rows = []
    results: Rows = []
    for image_id in range(count):
        for _ in range(int(random.integers(0, 9))):
            box = np.append(random.uniform(0, 300, 2), np.exp(random.uniform(2, 5.5, 2)))
            category_id = int(random.choice(category_ids))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(random.random() < 0.1),
                }
            )
            for _ in range(int(random.integers(0, 3))):
                moved = box + random.normal(0, 0.08, 4) * np.tile(box[2:], 2)
                taken_for = category_id if random.random() < 0.8 else int(random.choice(category_ids))
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": taken_for,
                        "bbox": moved.tolist(),
                        "score": float(random.random()),
                    }
                )
    return {
        "images": [{"id": image_id, "width": 600, "height": 600} for image_id in range(count)],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": f"class {category_id}"} for category_id in category_ids],
    }, results


def evaluate(ground_truth: dict[str, Any], rows: Rows, **settings: Any) -> CocoTable:
    return evaluate_coco(ground_truth, results_from(rows), **settings)


def by_hand(ground_truth: dict[str, Any], results: Rows, image_ids: list[int] | None) -> tuple[COCOeval, str]:
    """pycocotools as its demonstration uses it; and what it prints."""
    coco = COCO()
    coco.dataset = copy.deepcopy(ground_truth)
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(printed):
            evaluation.summarize()
    return evaluation, printed.getvalue()


@pytest.mark.parametrize("backend", [PYCOCOTOOLS, FASTER])
@pytest.mark.parametrize("image_ids", [None, [0, 3, 4, 7, 11]])
def test_equals_pycocotools_by_hand(image_ids: list[int] | None, backend: str) -> None:
    if backend == FASTER:
        pytest.importorskip("faster_coco_eval")
    ground_truth, results = images(30, 4)
    table = evaluate(ground_truth, results, image_ids=image_ids, backend=backend)
    oracle, printed = by_hand(ground_truth, results, image_ids)

    assert list(table.stats.values()) == pytest.approx(oracle.stats.tolist(), abs=1e-12)
    for line, expected, value in zip(table.summary().splitlines(), printed.splitlines(), oracle.stats, strict=True):
        place, _, number = expected.rpartition(" = ")
        assert float(number) == pytest.approx(value, abs=6e-4)
        assert line == f"{place} = {100 * value:.1f}"
    assert table.precision.shape == (101, 4)
    np.testing.assert_allclose(table.precision, oracle.eval["precision"][0, :, :, 0, 2], rtol=0, atol=1e-12)
    for column, row in enumerate(table.classes):
        one_class = oracle.eval["precision"][:, :, column, 0, 2]
        assert pytest.approx(one_class.mean(), abs=1e-12) == row.AP
        assert pytest.approx(one_class[0].mean(), abs=1e-12) == row.AP50


def test_the_twelve_numbers_stand_in_cocos_order() -> None:
    ground_truth, results = images(20, 2)
    stats = evaluate(ground_truth, results).stats
    assert " ".join(stats) == "AP AP50 AP75 AP_S AP_M AP_L AR_1 AR_10 AR_100 AR_S AR_M AR_L"
    assert stats["AP50"] > stats["AP"] > stats["AP75"] * 0.5 > 0
    assert stats["AR_1"] < stats["AR_10"] <= stats["AR_100"]


def test_class_rows_count_what_is_to_be_found() -> None:
    ground_truth, results = images(30, 3)
    for row in evaluate(ground_truth, results, image_ids=range(10)).classes:
        mine = [
            a
            for a in ground_truth["annotations"]
            if a["category_id"] == row.category_id and a["image_id"] < 10 and not a["iscrowd"]
        ]
        assert (row.boxes, row.images) == (len(mine), len({a["image_id"] for a in mine}))


def test_perfect_detections_score_one() -> None:
    ground_truth, _ = images(10, 3)
    results = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for row in ground_truth["annotations"]
    ]
    table = evaluate(ground_truth, results)
    assert pytest.approx((1, 1, 1)) == (table.AP, table.AP50, table.stats["AP75"])
    assert all(pytest.approx(1) == row.AP for row in table.classes)


def test_an_annotation_numbered_zero_counts_as_found() -> None:
    # COCOeval by itself takes a match with annotation 0 for no match.
    row = {"image_id": 0, "category_id": 1, "bbox": [10, 10, 50, 50]}
    ground_truth = {
        "images": [{"id": 0}],
        "annotations": [{"id": 0, **row}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    assert pytest.approx(1) == evaluate(ground_truth, [{**row, "score": 1.0}]).AP


def test_nothing_is_printed_and_nothing_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth, results = images(5, 2)
    before = json.dumps([ground_truth, results])
    evaluate(ground_truth, results)
    assert json.dumps([ground_truth, results]) == before
    assert capsys.readouterr().out == ""


def all_stats(table: CocoTable) -> set[float]:
    return set(table.stats.values())


def test_no_results_score_zero() -> None:
    ground_truth, _ = images(10, 3)
    table = evaluate(ground_truth, [])
    assert all_stats(table) == {0.0}
    assert np.all(table.precision == 0)


@pytest.mark.parametrize("lost", [["annotations"], ["annotations", "categories"], ["annotations", "images"]])
def test_nothing_to_find_scores_minus_one(lost: list[str]) -> None:
    ground_truth, results = images(4, 3)
    ground_truth = {**ground_truth, **{key: [] for key in lost}}
    kept = results if lost == ["annotations"] else []
    for rows in (kept, []):
        table = evaluate(ground_truth, rows)
        assert all_stats(table) == {-1.0}
        assert table.class_table().splitlines() == ["class  images  boxes  AP  AP50"]
        assert len(table.summary().splitlines()) == 12


def test_no_images_asked_scores_minus_one() -> None:
    ground_truth, results = images(4, 3)
    assert all_stats(evaluate(ground_truth, results, image_ids=[])) == {-1.0}


def test_a_class_without_boxes_is_minus_one_and_not_in_the_table() -> None:
    ground_truth, results = images(10, 2)
    ground_truth["categories"].append({"id": 5, "name": "unicorn"})
    table = evaluate(ground_truth, results)
    assert [row.category_id for row in table.classes] == [5, 10, 20]
    assert table.classes[0].AP == table.classes[0].AP50 == -1
    lines = table.class_table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line[:8] for line in lines[1:]] == ["class 10", "class 20"]


@pytest.mark.parametrize("backend", [PYCOCOTOOLS, FASTER])
def test_more_detections_than_there_are_change_nothing(backend: str) -> None:
    """So the twelve numbers beyond COCO's 100 detections are computed as COCO's."""
    ground_truth, rows = images(12, 3)
    coco, beyond = (evaluate(ground_truth, rows, backend=backend, max_detections=most) for most in (100, 150))
    assert list(beyond.stats.values()) == pytest.approx(list(coco.stats.values()), abs=1e-12)
    assert beyond.summary() == coco.summary().replace("maxDets=100", "maxDets=150")
    assert beyond.class_table() == coco.class_table()


@pytest.mark.parametrize("backend", [PYCOCOTOOLS, FASTER])
def test_detections_beyond_100_count_in_a_table_of_their_own(backend: str) -> None:
    boxes = [[10 * x, 10 * y, 8, 8] for x in range(15) for y in range(10)]
    rows = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5} for box in boxes]
    truth = [{**row, "id": number, "area": 64, "iscrowd": 0} for number, row in enumerate(rows, 1)]
    ground_truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}], "annotations": truth}
    coco, beyond = (evaluate(ground_truth, rows, backend=backend, max_detections=most) for most in (100, 150))
    assert pytest.approx(67 / 101) == coco.AP  # the recalls 0, 0.01 ... 0.66 of 100 / 150
    assert pytest.approx(1) == beyond.AP
