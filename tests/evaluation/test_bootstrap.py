"""Intervals of AP against COCOeval, run again on each draw."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation import bootstrap
from evaluation.bootstrap import difference, drawn_AP, interval
from evaluation.matches import Matches, match_coco, mean_AP
from tests.evaluation.test_coco_map import images
from tests.reference.coco_copies import naive_AP
from tests.reference.coco_rows import results_from


def matches_of(count: int, classes: int) -> Matches:
    truth, rows = images(count, classes)
    return match_coco(truth, results_from(rows), range(count))


def check_against_cocoeval(draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_MOST", draws)
    truth, rows = images(20, 3)
    truth = {**truth, "annotations": [{**row, "id": n} for n, row in enumerate(truth["annotations"], 1)]}
    found = {**truth, "annotations": [{**row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in rows]}
    matches = match_coco(truth, results_from(rows), range(20))
    (drawn,) = drawn_AP(matches)
    random = np.random.default_rng(0)
    counts = [
        np.bincount(draw, minlength=20)
        for first in range(0, draws, 50)
        for draw in random.integers(20, size=(min(50, draws - first), 20))
    ]
    naive = np.array([naive_AP(truth, found, range(20), each.tolist()) for each in counts])
    np.testing.assert_allclose(mean_AP(drawn), naive, rtol=0, atol=1e-12)
    assert interval(matches.AP(), mean_AP(drawn)) == pytest.approx(interval(matches.AP(), naive), abs=1e-12)


def test_draws_are_those_of_cocoeval_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_cocoeval(8, monkeypatch)


@pytest.mark.slow
def test_many_draws_are_those_of_cocoeval_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_cocoeval(200, monkeypatch)


def test_the_interval_is_about_the_value_and_does_not_change() -> None:
    matches = matches_of(40, 6)
    (drawn,), (again,) = drawn_AP(matches), drawn_AP(matches)
    np.testing.assert_array_equal(drawn, again)
    assert drawn.shape == (1000, 6)
    low, high = interval(matches.AP(), mean_AP(drawn)) or (1, 0)
    assert low < matches.AP() < high


def test_more_images_make_the_interval_narrower() -> None:
    def width(count: int) -> float:
        matches = matches_of(count, 2)
        low, high = interval(matches.AP(), mean_AP(drawn_AP(matches)[0])) or (0, 0)
        return high - low

    assert width(160) < 0.7 * width(40)


def test_of_large_sets_there_are_fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    matches = matches_of(10, 1)
    for work, expected in ((10**9, 1000), (300 * matches.detections, 300), (1, 100)):
        monkeypatch.setattr(bootstrap, "_WORK", work)
        assert len(drawn_AP(matches)[0]) == expected


def test_of_a_single_image_the_interval_is_its_value() -> None:
    truth, rows = images(1, 1, seed=3)
    matches = match_coco(truth, results_from(rows), [0])
    (drawn,) = drawn_AP(matches)
    assert interval(matches.AP(), mean_AP(drawn)) == pytest.approx((matches.AP(), matches.AP()))


def test_without_objects_there_is_no_interval() -> None:
    truth, rows = images(5, 2)
    matches = match_coco({**truth, "annotations": []}, results_from(rows), range(5))
    (drawn,) = drawn_AP(matches)
    assert interval(-1, mean_AP(drawn)) is None
    assert difference(-1, -1, drawn[:, 0], drawn[:, 0], images=0) is None


def test_nothing_differs_from_itself() -> None:
    matches = matches_of(20, 2)
    one, other = (mean_AP(each) for each in drawn_AP(matches, matches))
    found = difference(matches.AP(), matches.AP(), one, other, images=matches.images_with_objects)
    assert found is not None
    assert (found.value, found.interval, found.p, found.is_shown) == (0, (0, 0), 1, False)


def test_two_draws_of_one_distribution_rarely_differ() -> None:
    # Of 200 pairs 10 are expected to.
    random = np.random.default_rng(0)
    shown = 0
    for _ in range(200):
        values = random.normal(0, 1, (2, 60))
        drawn = values[:, random.integers(60, size=(400, 60))].mean(2)
        found = difference(*values.mean(1), *drawn, images=60)
        shown += found is not None and found.is_shown
    assert 2 <= shown <= 22


@pytest.mark.parametrize(("images", "p"), [(1, 1), (2, 0.5), (5, 0.0625), (6, 0.03125), (60, 2 / 1001)])
def test_few_images_show_no_more_than_a_sign_test_of_them_could(images: int, p: float) -> None:
    found = difference(0.2, 0.7, np.full(1000, 0.2), np.full(1000, 0.7), images=images)
    assert found is not None
    assert found.p == p and found.is_shown == (images > 5)
