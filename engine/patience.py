"""The end of a training that no longer gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.console import counted

NOISE = 0.002  # of AP: how much equally good weights of one training differ on 72 photographs (standard deviation)


class Patience:
    """Counts the evaluations in a row without a gain; `is_exhausted` after `evals` of them, None for never.

    A gain is an AP more than NOISE above that of the last gain, so that slow progress adds up to one. As long as AP is
    within NOISE of 0 nothing is counted: a training from scratch finds nothing at first.
    """

    def __init__(self, evals: int | None) -> None:
        self.evals = evals
        self._best, self._without_gain = 0.0, 0

    def __call__(self, ap: float) -> None:
        """Take in the AP of an evaluation, between 0 and 1."""
        if ap > self._best + NOISE:
            self._best, self._without_gain = ap, 0
        elif self._best:
            self._without_gain += 1

    @property
    def is_exhausted(self) -> bool:
        return self.evals is not None and self._without_gain >= self.evals

    def words(self) -> str:
        """Return why the training ends."""
        evaluations = counted(self._without_gain, "evaluation")
        return (
            f"no gain over AP {100 * self._best:.1f} in {evaluations}: the training ends; a larger --patience goes on"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "without_gain": self._without_gain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._without_gain = float(state["best"]), int(state["without_gain"])
