"""What happens in a training, and who is told: a console, files and loggers are all listeners."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models.norms.health import LayerHealth
from utils import ranks
from utils.console import warn


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A training that begins, or goes on after `step` optimizer steps and `epochs_done` epochs.

    run_id: is the same after a resume. settings: by name, as in settings.json.
    """

    folder: Path
    run_id: str
    settings: Mapping[str, Any]
    step: int
    epochs_done: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is known after optimizer step `step`, in epoch `epoch`, both from 1.

    scalars: of a step `train/loss`, `train/lr`, `speed/images_per_s` ...; of an evaluation `val/AP`, `val/AP50` (0..1)
    and `norm/...` (`models.norms.health.summary`); of an epoch the columns of results.csv. images: (H, W, 3) uint8 by
    name: the first batch, and an evaluation's detections. norms: of an evaluation, a layer each. words: for people.
    """

    step: int
    epoch: int
    scalars: Mapping[str, float] = field(default_factory=dict)
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    norms: tuple[LayerHealth, ...] = ()
    words: str = ""


class Listener:
    """Base of what is told of a training, on rank 0 only; a method that is not overridden ignores its event.

    One that raises an exception is told no more, and the training goes on.
    """

    def start(self, run: Run) -> None:
        """Before the first step."""

    def step(self, record: Record) -> None:
        """After each optimizer step."""

    def epoch(self, record: Record) -> None:
        """After each epoch, and its evaluation if it has one."""

    def evaluation(self, record: Record) -> None:
        """After each evaluation."""

    def end(self) -> None:
        """After the last step, or when the user stops the training."""

    def error(self, error: BaseException) -> None:
        """In place of `end`, when the training fails."""


Event = Literal["start", "step", "epoch", "evaluation", "end", "error"]


class Listeners:
    """Tells the listeners of a training what happens, in their order; has none on ranks other than 0."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._listeners = list(listeners) if ranks.is_rank_zero() else []

    def tell(self, event: Event, *what: Any) -> None:
        """Tell everybody. One that fails is named in a warning, and told no more."""
        for listener in tuple(self._listeners):
            try:
                getattr(listener, event)(*what)
            except Exception as error:
                self._listeners.remove(listener)
                warn(failure(type(listener).__name__, error))


def failure(name: str, error: BaseException) -> str:
    """Return the line for a listener that has failed."""
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"{name} has failed and is told no more of this training ({reason})"
