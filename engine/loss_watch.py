"""A watch over the loss: a training whose loss has risen far above its start is lost, and ends as a failure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median, median_low
from typing import Any

from utils.errors import UserError

_FIRST, _LAST = 5, 10  # steps that are compared, by their medians: a single spike does not count
_LOST = 30  # times the first steps' loss; mosaics, multi-scale and re-initialized heads vary it by a few times


class TrainingLost(UserError):
    """The training has diverged; what it wrote is not worth using. A page ends on it with exit code 3."""

    exit_code = 3


def remedies(*, is_sgd: bool, clip_norm: float | None) -> str:
    """Return what may keep the next training from diverging, as flags, what helps most often first."""
    clip = "--clip-norm 10" if clip_norm is None else "a smaller --clip-norm"
    return f"{'--optimizer adamw, ' * is_sgd}a lower --learning-rate, --learning-rate auto or {clip}"


class LossWatch:
    """Call it with the loss of each step. Raises TrainingLost, which names the `remedies`."""

    def __init__(self, remedies: str) -> None:
        self.remedies = remedies
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_LAST)

    def __call__(self, step: int, loss: float) -> None:
        self._last.append(loss)
        if len(self._first) < _FIRST:
            self._first.append(loss)
        elif len(self._last) == _LAST and median_low(self._last) > _LOST * median(self._first):
            raise TrainingLost(
                f"step {step}: the loss has risen from {median(self._first):.3g} to {median_low(self._last):.3g}, the "
                f"training is lost: start again with {self.remedies}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"first": list(self._first), "last": list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first, self._last = list(map(float, state["first"])), deque(map(float, state["last"]), maxlen=_LAST)
