"""The number of steps that fit into a time, on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.run_length import RunLength
from engine.time_budget import TimeBudget


class Training:
    """Steps, evaluations and a report of the given seconds, as the trainer would make them."""

    def __init__(
        self,
        budget: str,
        *,
        step_s: Callable[[float], float],
        evaluation_s: float = 0.0,
        evaluation_batches: float = 0.0,
        start_s: float = 0.0,
        epoch_steps: int = 10,
        evals: int = 5,
        state: dict | None = None,
    ) -> None:
        self.now_s, self.step_s, self.evaluation_s = 0.0, step_s, evaluation_s
        self.budget = TimeBudget(budget, evaluation_batches=evaluation_batches, reports=1, clock=lambda: self.now_s)
        if state is not None:
            self.budget.load_state_dict(state)
        self.length = RunLength(total_steps=10**6, epoch_steps=epoch_steps, evals=evals)
        self.step, self.fits, self.now_s = 0, list[tuple[int, int]](), start_s

    def run(self, until: int | None = None) -> Training:
        while self.step < (until or self.length.total_steps):
            self.now_s += self.step_s(self.now_s)
            self.step += 1
            if (fitted := self.budget.fit(self.length, self.step)) is not None:
                self.length = fitted
                self.fits.append((self.step, fitted.total_steps))
            epoch, rest = divmod(self.step, self.length.epoch_steps)
            is_over = self.step >= self.length.total_steps
            if (rest == 0 or is_over) and self.length.is_evaluation_due(epoch if rest else epoch - 1):
                with self.budget.evaluation():
                    self.now_s += self.evaluation_s
        return self

    @property
    def took_s(self) -> float:
        return self.now_s + self.evaluation_s  # of the report


@settings(deadline=None)
@given(
    st.floats(0.1, 5),
    st.floats(0, 10),
    st.floats(0, 60),
    st.floats(120, 2000),
    st.integers(1, 500),
    st.integers(1, 30),
)
def test_it_ends_in_time(
    step_s: float, evaluation_s: float, first_s: float, budget_s: float, epoch_steps: int, evals: int
) -> None:
    """A first step that is slower than the others does not count, and evaluations do."""
    assume((evals + 1) * evaluation_s < budget_s / 2 and first_s < budget_s / 4 and budget_s / step_s < 1000)
    training = Training(
        f"{budget_s:.0f}s",
        step_s=lambda now: step_s + first_s * (now == 0),
        evaluation_s=evaluation_s,
        evaluation_batches=2,
        epoch_steps=epoch_steps,
        evals=evals,
    ).run()
    allowed_s = 0.1 * budget_s + step_s + evaluation_s
    assert abs(training.took_s - budget_s) <= allowed_s
    assert training.fits[0][0] <= 21


@settings(deadline=None)
@given(st.floats(0.3, 3), st.floats(0.1, 0.9), st.floats(0.02, 0.5))
def test_it_ends_in_time_on_a_machine_that_gets_slower_or_faster(factor: float, when: float, step_s: float) -> None:
    training = Training("300s", step_s=lambda now: step_s * (factor if now > when * 300 else 1), evaluation_s=2).run()
    assert abs(training.took_s - 300) <= 0.11 * 300 + 2


def test_a_steady_pace_is_fitted_once_and_before_long() -> None:
    training = Training("100s", step_s=lambda _: 0.125).run()
    assert training.fits == [(21, 800)]
    assert Training("100s", step_s=lambda _: 2.0).run().fits == [(4, 50)], "a twentieth of the time is enough"
    assert Training("24h", step_s=lambda _: 25.0).run(until=10).fits[0][0] == 4, "or a minute"


@pytest.mark.parametrize("factor", [0.92, 1.04])
def test_within_the_tolerance_the_length_stays(factor: float) -> None:
    training = Training("100s", step_s=lambda now: 0.125 * (factor if now > 10 else 1)).run()
    assert training.fits == [(21, 800)]


def test_what_is_too_short_for_anything_ends_after_the_first_step_that_was_timed() -> None:
    training = Training("1s", step_s=lambda _: 60.0).run()
    assert training.step == training.length.total_steps == 2
    assert training.budget.words(training.length) == (
        "1 step measured at 60 s: 1s are over or too short for another step; an evaluation ends the training"
    )


def test_a_resumed_training_keeps_its_length_and_the_time_it_has_spent() -> None:
    before = Training("100s", step_s=lambda _: 0.125).run(until=300)
    after = Training("100s", step_s=lambda _: 0.125, state=before.budget.state_dict())
    assert after.budget.total_steps == before.length.total_steps
    after.step, after.length = before.step, before.length
    after.run()
    assert after.fits == [] and after.step == 800
    slower = Training("100s", step_s=lambda _: 0.25, state=before.budget.state_dict())
    slower.step, slower.length = before.step, before.length
    slower.run()
    assert slower.fits and before.now_s + slower.now_s == pytest.approx(100, abs=10)


def test_a_resumed_training_with_another_budget_is_fitted_to_what_is_left_of_it() -> None:
    before = Training("100s", step_s=lambda _: 0.125).run()
    after = Training("150s", step_s=lambda _: 0.125, state=before.budget.state_dict())
    assert after.budget.total_steps is None
    after.step = before.step
    after.run()
    assert after.step == 1200


def test_it_says_what_was_decided() -> None:
    training = Training("100s", step_s=lambda _: 2**-7).run(until=21)
    assert training.budget.words(training.length) == (
        "20 steps measured at 0.0078 s: 12,800 steps and 5 evaluations fit into 100s"
    )
