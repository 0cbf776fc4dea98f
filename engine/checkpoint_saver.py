"""When checkpoints of a training are written, and what happens where they cannot be."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from utils import ranks
from utils.atomic_file import warn_on_disk_error
from utils.checkpoint import Checkpoint
from utils.errors import UserError

_SHARE_FOR_SAVING = 0.05  # of the time, at most, for checkpoints at the ends of short epochs
_MOST_FAILURES = 5  # in a row, to write any checkpoint at all


class CheckpointSaver:
    """Writes checkpoints into the run folder, on rank 0, every `every_s` seconds and where it is cheap."""

    def __init__(self, folder: Path, *, every_s: float = 600) -> None:
        self.folder, self.every_s = folder, every_s
        self._saved_at, self._took_s = time.monotonic(), 0.0
        self._failures: int | None = 0  # to write a checkpoint, before the first success, after which it is None

    def save(self, name: str, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint into the folder. Returns whether that succeeded; if not, an earlier one is still there.

        Raises UserError once several could not be written and none has been since the start: the work would be lost.
        """
        if not ranks.is_rank_zero():
            return True
        start, is_written = time.monotonic(), False
        with warn_on_disk_error(self.folder / name):
            checkpoint.to_file(self.folder / name)
            is_written = True
        # Also after an error: an immediate second try would fail, too.
        self._saved_at = time.monotonic()
        self._took_s = self._saved_at - start
        if is_written:
            self._failures = None
        elif self._failures is not None:
            self._failures += 1
            lost = f"{self.folder}: nothing that is trained here can be saved"
            if self._failures == _MOST_FAILURES:
                raise UserError(f"{lost}, in {_MOST_FAILURES} tries; make room, or begin in another folder with --out")
            if self._failures == 1:
                print(f"error: {lost}; after {_MOST_FAILURES} failures in a row it ends: make room", file=sys.stderr)
        return is_written

    def is_due(self, *, at_epoch_end: bool = False) -> bool:
        """Return whether last.pt should be written now: after `every_s`, or cheaply at the end of an epoch."""
        if not ranks.is_rank_zero():
            return False
        passed_s = time.monotonic() - self._saved_at
        return passed_s > self.every_s or (at_epoch_end and passed_s * _SHARE_FOR_SAVING > self._took_s)
