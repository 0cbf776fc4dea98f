"""What a training shows while it runs: one progress bar, and lines above it."""

from __future__ import annotations

from engine.events import Listener, Record
from utils import ranks
from utils.progress import Progress


class ConsoleLog(Listener):
    """Shows the steps, with losses and speed, and the results of evaluations, on rank 0.

    total_steps: None if it is not known yet. step: how many are done already.
    """

    def __init__(self, *, total_steps: int | None, step: int = 0) -> None:
        self._progress = Progress(total_steps, unit="step", done=step, stays=True, is_shown=ranks.is_rank_zero())

    def step(self, record: Record) -> None:
        self._progress.advance(note=record.words)

    def evaluation(self, record: Record) -> None:
        self.say(f"epoch {record.epoch}: {record.words}")

    def end(self) -> None:
        self._progress.close()

    def error(self, error: BaseException) -> None:
        self._progress.close()

    def set_length(self, total_steps: int) -> None:
        self._progress.total = total_steps

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        self._progress.say(text)
