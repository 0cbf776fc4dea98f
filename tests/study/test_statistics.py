"""Intervals that hold what they promise, and p-values counted by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from study.statistics import estimate, gain, holm, sign_flip_p, won_back


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values, start=1))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_gain_at_every_seed_has_the_smallest_p_there_is(n: int) -> None:
    assert sign_flip_p(np.arange(1.0, n + 1)) == 2.0**-n
    assert sign_flip_p(-np.arange(1.0, n + 1)) == 1.0


def test_p_counts_sign_patterns() -> None:
    differences = np.array([3.0, -1.0, 2.0, 0.5])
    larger = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert sign_flip_p(differences) == sum(each >= differences.sum() for each in larger) / 16
    assert sign_flip_p(np.zeros(4)) == 1.0


def test_many_pairs_are_sampled() -> None:
    differences = np.random.default_rng(0).normal(0.2, 1, 20)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(20))
    assert sign_flip_p(differences) == pytest.approx(0.5 * math.erfc(t / math.sqrt(2)), abs=0.02)


def test_an_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        found = estimate(rng.normal(0, 1, 5).tolist())
        covered += found.low <= 0 <= found.high
    assert 0.91 <= covered / 300 <= 0.98


def test_few_seeds_have_the_widest_interval_or_none() -> None:
    three, one = estimate([0.1, 0.2, 0.6]), estimate([0.3])
    assert (three.value, three.low, three.high) == (pytest.approx(0.3), pytest.approx(0.1), pytest.approx(0.6))
    assert one.value == 0.3 and math.isnan(one.low) and math.isnan(one.high)


def test_a_gain_is_paired_by_seed() -> None:
    found = gain(by_seed(0.5, 0.3, 0.4), {1: 0.4, 2: 0.2, 4: 0.0})
    assert found is not None
    assert (found.value, found.seeds, found.p) == (pytest.approx(0.1), 2, 0.25)
    assert not found.is_significant
    assert gain(by_seed(0.5), {2: 0.1}) is None


def test_significance_takes_five_seeds() -> None:
    reference = by_seed(*[0.2] * 5)
    found = gain(by_seed(0.31, 0.28, 0.33, 0.3, 0.32), reference)
    assert found is not None and found.is_significant
    four = gain(dict(list(by_seed(0.31, 0.28, 0.33, 0.3).items())), reference)
    assert four is not None and four.low > 0 and not four.is_significant


def test_the_share_of_a_gap() -> None:
    small, large = by_seed(0.2, 0.22, 0.18), by_seed(0.4, 0.41, 0.39)
    whole, none = won_back(large, small, large), won_back(small, small, large)
    assert whole is not None and (whole.low, whole.value, whole.high) == (1, 1, 1)
    assert none is not None and (none.low, none.value, none.high) == (0, 0, 0)
    assert won_back(large, small, small) is None, "of no gap there is no share"


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([]) == []
    assert holm([0.031] * 2) == [False, False]
