"""How long a training takes, on a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import forecast, throughput
from engine.forecast import Forecast
from engine.run_length import RunLength


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 20), st.data())
def test_the_next_evaluation_is_the_first_that_is_due(total: int, epoch_steps: int, evals: int, data) -> None:
    length = RunLength(total_steps=total, epoch_steps=epoch_steps, evals=evals)
    step = data.draw(st.integers(0, total - 1))
    due = [min((e + 1) * epoch_steps, total) for e in range(length.epochs) if length.is_evaluation_due(e)]
    assert length.next_evaluation(step) == min(end for end in due if end > step)


def test_the_time_left_is_that_of_steps_and_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for module in (forecast, throughput):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    length = RunLength(total_steps=1000, epoch_steps=50, evals=10)
    told = Forecast(evaluation_batches=20)
    assert told.words(length, 0) == ""
    for step, _ in enumerate(told.watch([[0]] * 20)):
        now[0] += 60 if step < 3 else 1  # the first compile
        if told.is_first_known:
            assert step == 8
            # 42 steps and an evaluation of 20 batches at half the time; 992 steps and ten of them.
            assert told.words(length, 8) == "first AP in 52 s, the end in about 18 min"
    with told.evaluation():
        now[0] += 100
    assert told.words(length, 50).startswith("next AP in ")
    assert told.words(length, 960) == "the end in about 2 min"
    assert told.words(length, 1000) == ""
