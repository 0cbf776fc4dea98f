"""Detections as COCO results: numbers, order, rows, and the shares of several ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evaluation.coco_results import CocoResults, merged, results_of
from tests.reference.coco_rows import results_from
from utils.structures import Detections, Placement


def detections(boxes: list[list[float]], labels: list[int]) -> Detections:
    return Detections(
        boxes=torch.tensor(boxes).reshape(-1, 4),
        scores=torch.linspace(0.9, 0.1, len(labels)) if labels else torch.empty(0),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


LETTERBOX = Placement(source_hw=(100, 200), scale_x=2.0, scale_y=2.0, left_px=0.0, top_px=100.0)


def test_results_are_source_pixels_and_category_ids() -> None:
    rows = results_of(detections([[20, 120, 60, 140.125]], [1]), LETTERBOX, 7, [10, 20]).rows()
    assert rows == [{"image_id": 7, "category_id": 20, "bbox": [10.0, 10.0, 20.0, 10.062], "score": 0.9}]
    assert json.loads(json.dumps(rows)) == rows
    assert [type(value) for value in rows[0].values()] == [int, int, list, float]


def test_results_are_rounded_no_coarser_than_a_thousandth() -> None:
    source = np.random.default_rng(0).uniform(0, 90, (50, 2))
    boxes = np.concatenate([source, source + 10], axis=1)
    found = detections(LETTERBOX.to_input(boxes).tolist(), [0] * 50)
    rows = results_of(found, LETTERBOX, 0, [1]).rows()
    corners = np.array([[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)])
    np.testing.assert_allclose(corners, boxes, rtol=0, atol=1.2e-3)
    np.testing.assert_allclose([row["score"] for row in rows], found.scores, rtol=0, atol=1e-6)


def test_a_box_in_the_letterbox_border_yields_no_row() -> None:
    found = detections([[20, 10, 60, 90], [20, 90, 60, 140]], [0, 0])
    assert [row["bbox"] for row in results_of(found, LETTERBOX, 0, [1]).rows()] == [[10.0, 0.0, 20.0, 20.0]]
    assert results_of(detections([], []), LETTERBOX, 0, [1]).rows() == []


def test_many_results_are_those_of_a_loop() -> None:
    """The oracle rounds one number after the other, as Python does."""
    random = np.random.default_rng(0)
    corners = random.uniform(-20, 220, (200, 2, 2)).astype(np.float32)
    boxes = np.sort(corners, axis=1).reshape(-1, 4)
    labels = random.integers(0, 3, 200)
    scores = random.random(200, np.float32)
    found = Detections(boxes=torch.from_numpy(boxes), scores=torch.from_numpy(scores), labels=torch.from_numpy(labels))
    expected = []
    for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
        left, right = (min(max(x / 2, 0.0), 200.0) for x in box[::2])
        top, bottom = (min(max((y - 100) / 2, 0.0), 100.0) for y in box[1::2])
        bbox = [round(value, 3) for value in (left, top, right - left, bottom - top)]
        if bbox[2] > 0 and bbox[3] > 0:
            category = {0: 7, 1: 3, 2: 90}[label]
            expected.append({"image_id": 5, "category_id": category, "bbox": bbox, "score": round(score, 6)})
    assert 50 < len(expected) < 150
    assert results_of(found, LETTERBOX, 5, {0: 7, 1: 3, 2: 90}).rows() == expected


IMAGE_IDS = [40, 7, 1000, 12, 3, 5]


def found_in(image_ids: list[int]) -> list[CocoResults]:
    """Of each image up to five detections, the same ones whoever looks; scores with ties."""
    parts = []
    for image_id in image_ids:
        random = np.random.default_rng(image_id)
        count = image_id % 6
        rows = [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(
                random.integers(1, 4, count).tolist(),
                random.random((count, 4)).tolist(),
                random.integers(0, 3, count).tolist(),
                strict=True,
            )
        ]
        parts.append(results_from(rows))
    return parts


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("by_turns", [True, False])
def test_the_shares_of_ranks_are_merged_into_what_one_rank_finds(ranks: int, by_turns: bool) -> None:
    alone = merged(found_in(IMAGE_IDS), IMAGE_IDS)
    edges = [len(IMAGE_IDS) * rank // ranks for rank in range(ranks + 1)]
    shares = [IMAGE_IDS[rank::ranks] if by_turns else IMAGE_IDS[edges[rank] : edges[rank + 1]] for rank in range(ranks)]
    parts = [merged(found_in(share), share) for share in shares]
    for order in (parts, parts[::-1]):
        together = merged(order, IMAGE_IDS)
        for name in ("image_ids", "category_ids", "bboxes", "scores"):
            column, expected = getattr(together, name), getattr(alone, name)
            assert (column.dtype, column.tobytes()) == (expected.dtype, expected.tobytes())
    assert len(alone) > 10 and alone.rows() == [row for part in found_in(IMAGE_IDS) for row in part.rows()]


def test_merging_nothing() -> None:
    nothing = merged([], IMAGE_IDS)
    assert nothing.rows() == merged([nothing, nothing], []).rows() == []
    assert nothing.bboxes.shape == (0, 4)


def test_an_unknown_image_is_our_error() -> None:
    (part,) = found_in([5])
    with pytest.raises(AssertionError, match="not in image_ids"):
        merged([part], [40, 7])
