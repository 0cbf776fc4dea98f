"""After which epochs a training is evaluated."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.run_length import RunLength


def length_of(epochs: int, evals: int) -> RunLength:
    return RunLength(total_steps=epochs, epoch_steps=1, evals=evals)


def evaluated(epochs: int, evals: int) -> list[int]:
    """The epochs, from 1, that end with an evaluation."""
    length = length_of(epochs, evals)
    return [epoch + 1 for epoch in range(epochs) if length.is_evaluation_due(epoch)]


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(1, 100))
def test_there_are_as_many_evaluations_as_asked_for_and_the_last_epoch_has_one(epochs: int, evals: int) -> None:
    found = evaluated(epochs, evals)
    assert len(found) == min(evals, epochs) == length_of(epochs, evals).evaluations(epochs)
    assert found[-1] == epochs


@settings(deadline=None)
@given(st.integers(2, 1000), st.integers(2, 100))
def test_the_first_comes_within_a_twentieth_of_the_training_but_not_before_an_epoch(epochs: int, evals: int) -> None:
    assert evaluated(epochs, evals)[0] <= max(1, epochs / 20)


@settings(deadline=None)
@given(st.integers(2, 1000), st.integers(2, 100))
def test_the_others_are_spread_evenly(epochs: int, evals: int) -> None:
    found = evaluated(epochs, evals)
    gaps = [b - a for a, b in pairwise(found)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("epochs", "evals", "expected"),
    [
        (1, 10, [1]),
        (12, 4, [1, 5, 9, 12]),
        (12, 1, [12]),
        (3, 2, [1, 3]),
        (100, 5, [5, 29, 53, 77, 100]),
        (40, 40, list(range(1, 41))),
    ],
)
def test_examples(epochs: int, evals: int, expected: list[int]) -> None:
    assert evaluated(epochs, evals) == expected


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (12, 1), (13, 2), (24, 2)])
def test_the_last_epoch_may_be_cut_short(steps: int, epochs: int) -> None:
    assert RunLength(total_steps=steps, epoch_steps=12, evals=1).epochs == epochs
