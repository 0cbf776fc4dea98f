"""When checkpoints of a training are written, and what happens where they cannot be."""

from __future__ import annotations

import time
from pathlib import Path

from engine.save_failures import SaveFailures
from utils import ranks
from utils.atomic_file import warn_on_disk_error
from utils.checkpoint import Checkpoint

_SHARE_FOR_SAVING = 0.05  # of the time, at most, for checkpoints at the ends of short epochs


class CheckpointSaver:
    """Writes checkpoints into the run folder, on rank 0, every `every_s` seconds and where it is cheap."""

    def __init__(self, folder: Path, *, every_s: float = 600) -> None:
        self.folder, self.every_s = folder, every_s
        self._saved_at, self._took_s = time.monotonic(), 0.0
        self.failures = SaveFailures(folder, patience_s=every_s)

    def save(self, name: str, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint into the folder. Returns whether that succeeded; if not, an earlier one is still there.

        Raises UserError once too many could not be written: the work would be lost.
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
        self.failures.note(name, is_written=is_written)
        return is_written

    def is_due(self, *, at_epoch_end: bool = False) -> bool:
        """Return whether last.pt should be written now: after `every_s`, or cheaply at the end of an epoch."""
        if not ranks.is_rank_zero():
            return False
        passed_s = time.monotonic() - self._saved_at
        return passed_s > self.every_s or (at_epoch_end and passed_s * _SHARE_FOR_SAVING > self._took_s)
