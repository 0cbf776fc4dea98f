"""When a training has no gain any more."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.patience import NOISE, Patience
from options import TrainOptions


def end_of(aps: list[float], evals: int | None) -> int:
    """The evaluation, from 1, after which the training ends; 0 if it does not."""
    patience = Patience(evals)
    for number, ap in enumerate(aps, 1):
        patience(ap)
        if patience.is_exhausted:
            return number
    return 0


def test_it_ends_after_so_many_evaluations_in_a_row_without_a_gain() -> None:
    assert end_of([0.1, 0.2, 0.15, 0.3, 0.3, 0.29, 0.1], 3) == 7
    assert end_of([0.1, 0.2, 0.15, 0.3, 0.3, 0.29, 0.1], 1) == 3
    assert end_of([0.1, 0.2, 0.15, 0.3, 0.3, 0.29, 0.1], None) == 0


def test_a_gain_within_noise_is_none_but_slow_progress_adds_up() -> None:
    assert end_of([0.3, 0.3005, 0.301], 2) == 3
    assert end_of([0.3 + 0.0015 * number for number in range(50)], 2) == 0


def test_before_anything_is_found_nothing_is_counted() -> None:
    assert end_of([0.0] * 20 + [NOISE / 2] * 20, 2) == 0
    assert end_of([0.0] * 20 + [0.1] * 3, 2) == 23


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=30), st.integers(1, 5), st.integers(0, 30))
def test_a_resumed_training_ends_at_the_same_evaluation(aps: list[float], evals: int, cut: int) -> None:
    before, after = Patience(evals), Patience(evals)
    for ap in aps[:cut]:
        before(ap)
    after.load_state_dict(before.state_dict())
    for ap in aps[cut:]:
        before(ap)
        after(ap)
        assert before.is_exhausted == after.is_exhausted
    assert before.state_dict() == after.state_dict()


def test_it_says_why() -> None:
    patience = Patience(1)
    for ap in (0.4, 0.4):
        patience(ap)
    assert patience.words() == "no gain over AP 40.0 in 1 evaluation: the training ends; a larger --patience goes on"


@pytest.mark.parametrize("field", ["patience"])
def test_the_help_names_the_noise(field: str) -> None:
    assert f"{NOISE:g}" in TrainOptions.__dataclass_fields__[field].metadata["text"]
