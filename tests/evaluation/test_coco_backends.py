"""Both implementations of COCOeval give the same numbers, to 1e-12, whatever the images hold."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from evaluation.coco_backends import BACKENDS, FASTER, PYCOCOTOOLS, choose_backend, run_coco_eval
from utils.errors import UserError

Rows = list[dict[str, Any]]
SEEDS = 60


def row(number: int, image_id: int, category_id: int, bbox: Any, **more: Any) -> dict[str, Any]:
    bbox = [float(value) for value in bbox]
    named = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox}
    return {**named, "area": bbox[2] * bbox[3], "iscrowd": 0, **more}


def dataset(image_ids: list[int], category_ids: list[int], annotations: Rows) -> dict[str, Any]:
    return {
        "images": [{"id": image_id} for image_id in image_ids],
        "categories": [{"id": category_id, "name": str(category_id)} for category_id in category_ids],
        "annotations": annotations,
    }


def assert_same(truth: dict[str, Any], found: dict[str, Any], image_ids: list[int]) -> None:
    one, other = (
        run_coco_eval(copy.deepcopy(truth), copy.deepcopy(found), image_ids, backend=backend)
        for backend in (PYCOCOTOOLS, FASTER)
    )
    assert one[1].shape == (10, 101, len(truth["categories"]), 4, 3)
    for array, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-12)


def case(seed: int) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Truth, detections, images asked for: crowds, areas other than the box's, tied scores, equal boxes, duplicates,
    other classes, classes and images without boxes, and now and then an image with 250 detections, or none at all.
    """
    random = np.random.default_rng(seed)
    image_ids = random.permutation(50)[: random.integers(1, 8)].tolist()
    category_ids = random.permutation(90)[: random.integers(1, 5)].tolist()
    on_a_grid = seed % 2 == 0
    truths: Rows = []
    found: Rows = []

    def any_box() -> np.ndarray:
        box = np.append(random.uniform(0, 300, 2), np.exp(random.uniform(1, 6, 2)))
        return (box / 16).round() * 16 if on_a_grid else box.round(3)

    def add(image_id: int, category_id: int, box: np.ndarray) -> None:
        score = round(float(random.random()), 1 if on_a_grid else 6)
        found.append(row(len(found) + 1, image_id, category_id, box, score=score))

    for image_id in image_ids:
        for _ in range(random.integers(0, 8)):
            box, category_id = any_box(), int(random.choice(category_ids))
            crowd, share = int(random.random() < 0.15), random.choice([1, 1, 0.4])
            area = float(box[2] * box[3] * share)
            truths.append(row(len(truths) + 1, image_id, category_id, box, area=area, iscrowd=crowd))
            for _ in range(random.integers(0, 4)):
                noise = random.normal(0, 0.1, 4) * np.tile(box[2:], 2) * (random.random() < 0.7)
                other = int(random.choice(category_ids))
                add(image_id, category_id if random.random() < 0.8 else other, (box + noise).round(3))
        for _ in range(250 if seed % 10 == 9 and image_id == image_ids[0] else 0):
            add(image_id, category_ids[0], any_box())
    asked = [image_id for image_id in image_ids if seed % 3 or random.random() < 0.6]
    kept = [] if seed % 20 == 4 else found
    return dataset(image_ids, category_ids, truths), dataset(image_ids, category_ids, kept), asked


@pytest.fixture
def both() -> None:
    pytest.importorskip("faster_coco_eval")


@pytest.mark.usefixtures("both")
def test_equal_on_random_images() -> None:
    for seed in range(SEEDS):
        assert_same(*case(seed))


@pytest.mark.slow
@pytest.mark.usefixtures("both")
def test_equal_on_many_random_images() -> None:
    for seed in range(SEEDS, 600):
        assert_same(*case(seed))


@pytest.mark.usefixtures("both")
def test_equal_where_there_is_nothing() -> None:
    truth = dataset([3, 4], [1, 2], [row(1, 3, 2, (0, 0, 10, 10))])
    nothing = dataset([3, 4], [1, 2], [])
    found = dataset([3, 4], [1, 2], [row(1, 3, 2, (0, 0, 10, 10), score=0.5), row(2, 4, 1, (0, 0, 9, 9), score=0.5)])
    for truths in (truth, nothing):
        for results in (found, nothing):
            for image_ids in ([3, 4], [4], []):
                assert_same(truths, results, image_ids)
    for images, categories in (([], []), ([3], []), ([], [1])):
        assert_same(dataset(images, categories, []), dataset(images, categories, []), images)


def test_the_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BACKENDS == ("auto", PYCOCOTOOLS, FASTER)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [choose_backend(name) for name in BACKENDS] == [FASTER, PYCOCOTOOLS, FASTER]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [choose_backend(name) for name in BACKENDS[:2]] == [PYCOCOTOOLS] * 2
    with pytest.raises(UserError, match=r"^faster-coco-eval is not installed: run `pip install faster-coco-eval`"):
        choose_backend(FASTER)


def test_pycocotools_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stock = COCOeval.accumulate
    monkeypatch.setattr(COCOeval, "accumulate", lambda self: (calls.append(1), stock(self)))
    truth = dataset([3], [1], [row(1, 3, 1, (0, 0, 10, 10))])
    run_coco_eval(truth, dataset([3], [1], []), [3], backend=PYCOCOTOOLS)
    assert calls == [1]
