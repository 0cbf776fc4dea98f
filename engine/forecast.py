"""How long a training takes, from the pace of its first steps and evaluations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from engine.run_length import RunLength
from engine.throughput import Throughput
from utils.duration import in_words
from utils.structures import Batch

EVALUATION_SHARE = 0.5  # of the time of training on as many images, until an evaluation has been timed
WARM_UP_STEPS, TIMED_STEPS = 3, 5  # the first allocate, start workers, compile and choose algorithms


class Forecast:
    """Times steps and evaluations since the start or resume. evaluation_batches: of the size of a training batch."""

    def __init__(self, *, evaluation_batches: float) -> None:
        self.speed = Throughput()
        self._evaluation_batches, self._evaluation_s = evaluation_batches, 0.0
        self._watched = 0

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        for batch in self.speed.watch(batches):
            if self._watched == WARM_UP_STEPS:
                self.speed.clear()
            self._watched += 1
            yield batch

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time an evaluation."""
        start_s = time.monotonic()
        yield
        self._evaluation_s = time.monotonic() - start_s

    @property
    def is_first_known(self) -> bool:
        """True once, as soon as it can be told: while the step after the timed ones is at work."""
        return self._watched == WARM_UP_STEPS + TIMED_STEPS + 1

    def words(self, length: RunLength, step: int) -> str:
        """Return such as "first AP in 2 min, the end in about 1:20 h", after so many steps; "" if it is not known."""
        if not self.speed.steps or step >= length.total_steps:
            return ""
        step_s = self.speed.took_s / self.speed.steps
        evaluation_s = self._evaluation_s or EVALUATION_SHARE * self._evaluation_batches * step_s
        done = step // length.epoch_steps
        end_s = length.seconds_left(step, done, step_s=step_s, evaluation_s=evaluation_s)
        end = f"the end in about {in_words(end_s)}"
        next_step = length.next_evaluation(step)
        if next_step >= length.total_steps:  # the first AP is the last
            return end
        which = "next" if self._evaluation_s or step > length.next_evaluation(0) else "first"
        return f"{which} AP in {in_words((next_step - step) * step_s + evaluation_s)}, {end}"
