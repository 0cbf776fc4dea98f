"""confusion_matrix against an oracle of plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evaluation import confusion
from tests.reference.coco_rows import results_from

Row = dict[str, Any]


def confusion_matrix(ground_truth: dict[str, Any], rows: list[Row], **settings: Any) -> np.ndarray:
    return confusion.confusion_matrix(ground_truth, results_from(rows), **settings)


def shared_area(first: list[float], second: list[float]) -> float:
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def iou(first: list[float], second: list[float]) -> float:
    shared = shared_area(first, second)
    return shared / (first[2] * first[3] + second[2] * second[3] - shared)


def oracle(ground_truth: dict[str, Any], results: list[Row]) -> np.ndarray:
    """Walk all detections of all images, best first, each looking through every annotation."""
    ids = sorted(category["id"] for category in ground_truth["categories"])
    matrix = np.zeros((len(ids) + 1, len(ids) + 1), int)
    unseen = [row for row in ground_truth["annotations"] if not row["iscrowd"]]
    for detection in sorted(results, key=lambda row: row["score"], reverse=True):
        if detection["score"] < 0.25:
            continue
        here = [row for row in unseen if row["image_id"] == detection["image_id"]]
        best = max(here, key=lambda row: iou(row["bbox"], detection["bbox"]), default=None)
        if best is not None and iou(best["bbox"], detection["bbox"]) >= 0.5:
            unseen = [row for row in unseen if row is not best]
            matrix[ids.index(detection["category_id"]), ids.index(best["category_id"])] += 1
            continue
        area = detection["bbox"][2] * detection["bbox"][3]
        in_crowd = any(
            row["iscrowd"]
            and row["image_id"] == detection["image_id"]
            and shared_area(row["bbox"], detection["bbox"]) >= 0.5 * area
            for row in ground_truth["annotations"]
        )
        if not in_crowd:
            matrix[ids.index(detection["category_id"]), -1] += 1
    for row in unseen:
        matrix[-1, ids.index(row["category_id"])] += 1
    return matrix


def crowded_images(seed: int) -> tuple[dict[str, Any], list[Row]]:
    """Objects, several detections near each, and some anywhere; a tenth of the objects are crowds."""
    random = np.random.default_rng(seed)
    annotations: list[Row] = []
    results: list[Row] = []
    for number in range(120):
        image_id = int(random.integers(6))
        box = np.append(random.uniform(0, 60, 2), random.uniform(10, 50, 2))
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": int(random.integers(3, 7)),
                "bbox": box.tolist(),
                "iscrowd": int(random.random() < 0.1),
            }
        )
        for _ in range(int(random.integers(0, 4))):
            moved = box + random.normal(0, 3, 4) if random.random() < 0.7 else random.uniform(10, 60, 4)
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(random.integers(3, 7)),
                    "bbox": moved.tolist(),
                    "score": float(random.random()),
                }
            )
    return {
        "images": [{"id": image_id} for image_id in range(6)],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": str(category_id)} for category_id in (6, 5, 4, 3)],
    }, results


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_oracle(seed: int) -> None:
    ground_truth, results = crowded_images(seed)
    matrix = confusion_matrix(ground_truth, results)
    assert matrix.shape == (5, 5) and matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, oracle(ground_truth, results))
    assert min(matrix[:-1, :-1].sum(), matrix[-1].sum(), matrix[:, -1].sum()) > 0


def test_columns_sum_to_the_objects() -> None:
    ground_truth, results = crowded_images(0)
    matrix = confusion_matrix(ground_truth, results, min_score=0.6)
    for column, category_id in enumerate((3, 4, 5, 6)):
        objects = [
            row for row in ground_truth["annotations"] if row["category_id"] == category_id and not row["iscrowd"]
        ]
        assert matrix[:, column].sum() == len(objects)
    assert matrix[-1, -1] == 0


def test_perfect_detections_lie_on_the_diagonal_even_where_boxes_coincide() -> None:
    ground_truth, _ = crowded_images(0)
    rows = [row for row in ground_truth["annotations"] if not row["iscrowd"]]
    twin = {**rows[0], "category_id": 3 if rows[0]["category_id"] != 3 else 4}
    ground_truth["annotations"] = [*rows, twin]
    matrix = confusion_matrix(ground_truth, [{**row, "score": 0.9} for row in [twin, *rows]])
    assert np.trace(matrix) == matrix.sum() == len(rows) + 1


def one_image(*annotations: Row) -> dict[str, Any]:
    return {
        "images": [{"id": 1}],
        "annotations": [{"image_id": 1, **row} for row in annotations],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def found(box: list[float], category_id: int, score: float) -> Row:
    return {"image_id": 1, "category_id": category_id, "bbox": box, "score": score}


def test_the_better_score_takes_the_object_and_the_other_falls_on_background() -> None:
    ground_truth = one_image({"category_id": 1, "bbox": [0, 0, 10, 10]})
    results = [found([0, 0, 10, 10], 1, 0.5), found([0, 0, 10, 9], 2, 0.9)]
    np.testing.assert_array_equal(confusion_matrix(ground_truth, results), [[0, 0, 1], [1, 0, 0], [0, 0, 0]])


def test_a_detection_within_a_crowd_is_not_counted() -> None:
    ground_truth = one_image({"category_id": 1, "bbox": [0, 0, 100, 100], "iscrowd": 1})
    results = [found([5, 5, 10, 10], 2, 0.9), found([96, 96, 10, 10], 2, 0.9)]
    np.testing.assert_array_equal(confusion_matrix(ground_truth, results), [[0, 0, 0], [0, 0, 1], [0, 0, 0]])


def test_empty_cases() -> None:
    truth = one_image({"category_id": 2, "bbox": [0, 0, 10, 10]})
    assert confusion_matrix(truth, [])[2].tolist() == [0, 1, 0]
    assert confusion_matrix(truth, [found([0, 0, 10, 10], 2, 0.9)], image_ids=[]).sum() == 0
    assert confusion_matrix(one_image(), [found([0, 0, 0, 0], 2, 0.9)])[1].tolist() == [0, 0, 1]
    assert confusion_matrix(one_image(), []).sum() == 0
    assert confusion_matrix({"images": [], "annotations": [], "categories": []}, []).tolist() == [[0]]
