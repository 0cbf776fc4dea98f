"""Checkpoints that could not be written: when a training that goes on would only waste its time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from utils.errors import UserError
from utils.printable import printable

_MOST_AT_FIRST = 5  # failures in a row, while none was written yet
_MOST = 20  # afterwards: a disk that fills often is emptied again


class SaveFailures:
    """Failures in a row to write each checkpoint of a run. patience_s: a run that was saved once goes on so long."""

    def __init__(self, folder: Path, *, patience_s: float) -> None:
        self.folder, self.patience_s = folder, patience_s
        self._was_saved = False
        self._failing: dict[str, tuple[int, float]] = {}  # name -> how often, and when for the first time

    @property
    def failing(self) -> tuple[str, ...]:
        """Names of the files that could not be written the last time."""
        return tuple(self._failing)

    def note(self, name: str, *, is_written: bool) -> None:
        """Count an attempt to write a file. Raises UserError once the training should end."""
        if is_written:
            self._was_saved = True
            self._failing.pop(name, None)
            return
        now = time.monotonic()
        times, since = self._failing.get(name, (0, now))
        self._failing[name] = times + 1, since
        total = sum(times for times, _ in self._failing.values())
        lost = f"{self.folder}: nothing that is trained here can be saved"
        if not self._was_saved:
            if total >= _MOST_AT_FIRST:
                raise UserError(f"{lost}, in {total} tries; make room, or begin in another folder with --out")
            if total == 1:
                ends = f"after {_MOST_AT_FIRST} failures in a row it ends: make room"
                print(printable(f"error: {lost}; {ends}"), file=sys.stderr)
        elif times + 1 >= _MOST and now - since >= self.patience_s:
            raise UserError(f"{self.words()}, in {times + 1} tries")

    def words(self) -> str:
        """Return which files are not as the training is, and what to do."""
        files = " and ".join(self.failing)
        return f"{self.folder}: {files} could not be written; make room, and go on with --resume {self.folder}"
