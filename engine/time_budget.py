"""The number of steps that fit into a given time, with their evaluations."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

from engine.forecast import EVALUATION_SHARE
from engine.run_length import RunLength
from utils import ranks
from utils.console import counted
from utils.duration import seconds_in

_FIRST_STEPS, _FIRST_S, _FIRST_SHARE = 20, 60.0, 0.05  # measured before the first fit, whichever comes first
_RECENT_STEPS = 100  # whose mean is the pace
_LATE, _EARLY = 0.05, 0.1  # shares of the budget by which the end may be off before the steps are fitted again


class TimeBudget:
    """Fits the length of a training to a time, such as "1h30m", which counts from here to the end of the report.

    The length is decided once, by the pace of the first 20 steps, minute or twentieth of the budget, without the very
    first step. It is fitted again only if at the pace of the last 100 steps the training would end a twentieth of the
    budget too late, or a tenth too early. total_steps: what was decided last, None before; a resumed training keeps it.

    evaluation_batches: of the size of a training batch. reports: what comes after the training, in evaluations.
    """

    def __init__(
        self, budget: str, *, evaluation_batches: float, reports: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget, self.budget_s, self.reports = budget, seconds_in(budget), reports
        self.total_steps: int | None = None
        self._evaluation_batches = evaluation_batches
        self._evaluation_s: float | None = None
        self._is_spent = False
        self._clock, self._start_s = clock, clock()
        self._step_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._stepped_at: float | None = None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time an evaluation, which does not count for the pace of the steps."""
        start = self._clock()
        yield
        self._stepped_at = self._clock()
        self._evaluation_s = self._stepped_at - start

    def fit(self, length: RunLength, step: int) -> RunLength | None:
        """Return another length if it is due, after optimizer step number `step`. A collective: rank 0's clock counts.

        length: the one of now, or before the first fit any of the same epochs and evals.
        """
        now = self._clock()
        if self._stepped_at is not None:
            self._step_s.append(now - self._stepped_at)
        self._stepped_at = now
        total_steps = ranks.broadcast(self._fitted(length, step))
        if total_steps is None:
            return None
        self.total_steps = total_steps
        return replace(length, total_steps=total_steps)

    def words(self, length: RunLength) -> str:
        """Return what was decided: "20 steps measured at 0.41 s: 2,160 steps and 10 evaluations fit into 15m"."""
        measured = f"{counted(len(self._step_s), 'step')} measured at {fmean(self._step_s):.2g} s"
        if self._is_spent:
            return f"{measured}: {self.budget} are over or too short for another step; an evaluation ends the training"
        evaluations = counted(length.evaluations(length.epochs), "evaluation")
        return f"{measured}: {counted(length.total_steps, 'step')} and {evaluations} fit into {self.budget}"

    def state_dict(self) -> dict[str, Any]:
        spent_s = self._clock() - self._start_s
        return {
            "budget": self.budget,
            "total_steps": self.total_steps,
            "spent_s": spent_s,
            "evaluation_s": self._evaluation_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the time spent, and the length unless another budget was typed."""
        self.total_steps = state["total_steps"] if state["budget"] == self.budget else None
        self._evaluation_s = state["evaluation_s"]
        self._start_s -= state["spent_s"]

    def _fitted(self, length: RunLength, step: int) -> int | None:
        """Return the number of steps that fit, None if it is not due, or the same as before."""
        enough_s = min(_FIRST_S, _FIRST_SHARE * self.budget_s)
        if not self._step_s or (len(self._step_s) < _FIRST_STEPS and sum(self._step_s) < enough_s):
            return None
        pace_s = fmean(self._step_s)
        evaluation_s = self._evaluation_s
        if evaluation_s is None:
            evaluation_s = EVALUATION_SHARE * self._evaluation_batches * pace_s
        spent_s = self._clock() - self._start_s

        def end_s(total_steps: int) -> float:
            whole = replace(length, total_steps=total_steps)
            done = (step - 1) // length.epoch_steps  # epochs: the evaluation after this step is still to come
            left_s = whole.seconds_left(step, done, step_s=pace_s, evaluation_s=evaluation_s)
            return spent_s + left_s + self.reports * evaluation_s

        if self.total_steps is not None and -_EARLY <= end_s(self.total_steps) / self.budget_s - 1 <= _LATE:
            return None
        most = step + max(0, int((self.budget_s - spent_s) / pace_s))
        total_steps = step + bisect_right(range(step + 1, most + 1), self.budget_s, key=end_s)
        self._is_spent = total_steps == step
        return None if total_steps == self.total_steps else total_steps
