"""evaluate_coco against pycocotools driven by hand, on crowds, all sizes and several classes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.coco_map import CocoTable, evaluate_coco, results_of
from utils.structures import Detections, Placement

Rows = list[dict[str, Any]]


def pictures(count: int, classes: int, seed: int = 0) -> tuple[dict[str, Any], Rows]:
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


@pytest.mark.parametrize("image_ids", [None, [0, 3, 4, 7, 11]])
def test_equals_pycocotools_by_hand(image_ids: list[int] | None) -> None:
    ground_truth, results = pictures(30, 4)
    table = evaluate_coco(ground_truth, results, image_ids=image_ids)
    oracle, printed = by_hand(ground_truth, results, image_ids)

    np.testing.assert_allclose(list(table.stats().values()), oracle.stats, rtol=0, atol=1e-12)
    assert table.summary() == printed.rstrip("\n")
    assert table.precision.shape == (101, 4)
    np.testing.assert_array_equal(table.precision, oracle.eval["precision"][0, :, :, 0, 2])
    for column, row in enumerate(table.classes):
        one_class = oracle.eval["precision"][:, :, column, 0, 2]
        assert pytest.approx(one_class.mean(), abs=1e-12) == row.AP
        assert pytest.approx(one_class[0].mean(), abs=1e-12) == row.AP50


def test_the_twelve_numbers_stand_in_cocos_order() -> None:
    ground_truth, results = pictures(20, 2)
    stats = evaluate_coco(ground_truth, results).stats()
    assert " ".join(stats) == "AP AP50 AP75 AP_S AP_M AP_L AR_1 AR_10 AR_100 AR_S AR_M AR_L"
    assert stats["AP50"] > stats["AP"] > stats["AP75"] * 0.5 > 0
    assert stats["AR_1"] < stats["AR_10"] <= stats["AR_100"]


def test_class_rows_count_what_is_to_be_found() -> None:
    ground_truth, results = pictures(30, 3)
    for row in evaluate_coco(ground_truth, results, image_ids=range(10)).classes:
        mine = [
            a
            for a in ground_truth["annotations"]
            if a["category_id"] == row.category_id and a["image_id"] < 10 and not a["iscrowd"]
        ]
        assert (row.boxes, row.images) == (len(mine), len({a["image_id"] for a in mine}))


def test_perfect_detections_score_one() -> None:
    ground_truth, _ = pictures(10, 3)
    results = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for row in ground_truth["annotations"]
    ]
    table = evaluate_coco(ground_truth, results)
    assert pytest.approx((1, 1, 1)) == (table.AP, table.AP50, table.AP75)
    assert all(pytest.approx(1) == row.AP for row in table.classes)


def test_an_annotation_numbered_zero_counts_as_found() -> None:
    # COCOeval by itself takes a match with annotation 0 for no match.
    row = {"image_id": 0, "category_id": 1, "bbox": [10, 10, 50, 50]}
    ground_truth = {
        "images": [{"id": 0}],
        "annotations": [{"id": 0, **row}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    assert pytest.approx(1) == evaluate_coco(ground_truth, [{**row, "score": 1.0}]).AP


def test_nothing_is_printed_and_nothing_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth, results = pictures(5, 2)
    before = json.dumps([ground_truth, results])
    evaluate_coco(ground_truth, results)
    assert json.dumps([ground_truth, results]) == before
    assert capsys.readouterr().out == ""


def all_stats(table: CocoTable) -> set[float]:
    return set(table.stats().values())


def test_no_results_score_zero() -> None:
    ground_truth, _ = pictures(10, 3)
    table = evaluate_coco(ground_truth, [])
    assert all_stats(table) == {0.0}
    assert np.all(table.precision == 0)


@pytest.mark.parametrize("lost", [["annotations"], ["annotations", "categories"], ["annotations", "images"]])
def test_nothing_to_find_scores_minus_one(lost: list[str]) -> None:
    ground_truth, results = pictures(4, 3)
    ground_truth = {**ground_truth, **{key: [] for key in lost}}
    kept = results if lost == ["annotations"] else []
    for rows in (kept, []):
        table = evaluate_coco(ground_truth, rows)
        assert all_stats(table) == {-1.0}
        assert table.class_table().splitlines() == ["class  images   boxes     AP   AP50"]
        assert len(table.summary().splitlines()) == 12


def test_no_images_asked_scores_minus_one() -> None:
    ground_truth, results = pictures(4, 3)
    assert all_stats(evaluate_coco(ground_truth, results, image_ids=[])) == {-1.0}


def test_a_class_without_boxes_is_minus_one_and_not_in_the_table() -> None:
    ground_truth, results = pictures(10, 2)
    ground_truth["categories"].append({"id": 5, "name": "unicorn"})
    table = evaluate_coco(ground_truth, results)
    assert [row.category_id for row in table.classes] == [5, 10, 20]
    assert table.classes[0].AP == table.classes[0].AP50 == -1
    lines = table.class_table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line[:8] for line in lines[1:]] == ["class 10", "class 20"]


@pytest.mark.parametrize(
    ("change", "message"), [({"image_id": 99}, "image id 99"), ({"category_id": 3}, "category id 3")]
)
def test_strangers_are_refused(change: dict[str, int], message: str) -> None:
    ground_truth, results = pictures(4, 2)
    with pytest.raises(ValueError, match=message):
        evaluate_coco(ground_truth, [{**results[0], **change}])
    with pytest.raises(ValueError, match="image id 77"):
        evaluate_coco(ground_truth, results, image_ids=[0, 77])


def detections(boxes: list[list[float]], labels: list[int]) -> Detections:
    return Detections(
        boxes=torch.tensor(boxes).reshape(-1, 4),
        scores=torch.linspace(0.9, 0.1, len(labels)) if labels else torch.empty(0),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


LETTERBOX = Placement(source_hw=(100, 200), scale_x=2.0, scale_y=2.0, left_px=0.0, top_px=100.0)


def test_results_are_source_pixels_and_category_ids() -> None:
    rows = results_of(detections([[20, 120, 60, 140.125]], [1]), LETTERBOX, 7, [10, 20])
    assert rows == [{"image_id": 7, "category_id": 20, "bbox": [10.0, 10.0, 20.0, 10.062], "score": 0.9}]
    assert json.loads(json.dumps(rows)) == rows


def test_results_are_rounded_no_coarser_than_a_thousandth() -> None:
    source = np.random.default_rng(0).uniform(0, 90, (50, 2))
    boxes = np.concatenate([source, source + 10], axis=1)
    found = detections(LETTERBOX.to_input(boxes).tolist(), [0] * 50)
    rows = results_of(found, LETTERBOX, 0, [1])
    corners = np.array([[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)])
    np.testing.assert_allclose(corners, boxes, rtol=0, atol=1.2e-3)
    np.testing.assert_allclose([row["score"] for row in rows], found.scores, rtol=0, atol=1e-6)


def test_a_box_in_the_letterbox_border_yields_no_row() -> None:
    found = detections([[20, 10, 60, 90], [20, 90, 60, 140]], [0, 0])
    assert [row["bbox"] for row in results_of(found, LETTERBOX, 0, [1])] == [[10.0, 0.0, 20.0, 20.0]]
    assert results_of(detections([], []), LETTERBOX, 0, [1]) == []
