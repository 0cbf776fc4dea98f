"""The files that a training writes into its run folder while it runs, and its progress bar."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine.results_csv import add_row, drop_rows_after
from engine.save_failures import SaveFailures
from engine.throughput import Throughput
from utils import ranks
from utils.atomic_file import warn_on_disk_error, write_text
from utils.checkpoint import Checkpoint
from utils.console import line
from utils.draw import write_png
from utils.structures import Batch

_SHARE_FOR_SAVING = 0.05  # of the time, at most, for checkpoints at the ends of short epochs
_WARM_UP_STEPS, _TIMED_STEPS = 3, 5


class RunLog:
    """Writes checkpoints, settings.json, results.csv (a row per epoch) and TensorBoard; shows one progress bar.

    Only rank 0 writes and prints. A file that cannot be written, on a full disk, is reported in a line, and the
    training continues.

    total_steps: None if it is not known yet. epochs_done: rows of later epochs, which a run that was killed had
    written, are dropped.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int | None,
        first_step: int = 0,
        epochs_done: int = 0,
        save_every_s: float = 600,
    ) -> None:
        self.folder, self.save_every_s = folder, save_every_s
        self._is_writer = ranks.is_rank_zero()
        self._board: SummaryWriter | None = None
        if self._is_writer:
            folder.mkdir(parents=True, exist_ok=True)
            with warn_on_disk_error(folder / "results.csv"):
                drop_rows_after(folder / "results.csv", epochs_done)
            threading.excepthook = _leave_to_the_writer
            with warn_on_disk_error(folder / "tensorboard"):
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        # In a file or a pipe, a line every half minute is enough.
        interval_s = 0.2 if sys.stderr.isatty() else 30
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            mininterval=interval_s,
            maxinterval=max(10, interval_s),
            dynamic_ncols=True,
            disable=not self._is_writer,
            delay=1e-6,  # not before the first step: other lines come first
        )
        self._sum, self._count = torch.zeros(3, dtype=torch.float64), 0
        self._earlier_s = 0.0  # in this epoch, before the run was resumed
        self._throughput, self._first_throughput = Throughput(), Throughput()
        self._watched = 0  # batches since the start or resume
        self._saved_at, self._save_took_s = time.monotonic(), 0.0
        self.failures = SaveFailures(folder, patience_s=save_every_s)

    def set_length(self, total_steps: int) -> None:
        self._bar.total = total_steps

    def settings(self, settings: Mapping[str, Any]) -> None:
        if not self._is_writer:
            return
        with warn_on_disk_error(self.folder / "settings.json"):
            write_text(self.folder / "settings.json", json.dumps(settings, indent=2) + "\n")

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of an epoch; after the first few of the run, print how long it will take."""
        self._throughput.clear()
        speed = self._first_throughput
        for batch in speed.watch(self._throughput.watch(batches)):
            if self._watched == _WARM_UP_STEPS:  # they allocate, start workers, compile and choose algorithms
                speed.clear()
            if self._watched == _WARM_UP_STEPS + _TIMED_STEPS:
                total_steps = self._bar.total
                left = f"; {speed.hours_for(total_steps - self._bar.n)} h to go" if total_steps else ""
                self.say(line("speed", f"{speed}{left}"))
            self._watched += 1
            yield batch

    def losses(self, step: int, terms: Tensor, *, lr: float, epoch: str) -> None:
        """Log the (3,) losses box, objectness, class, per image, of optimizer step number `step` (from 1)."""
        named = _named(terms)
        self._sum += terms.double()
        self._count += 1
        scalars = {f"train/{name}": value for name, value in (*named.items(), ("lr", lr))}
        if self._throughput.steps:
            scalars["speed/images_per_s"] = self._throughput.images_per_s
            scalars["speed/share_waiting_for_data"] = self._throughput.share_waiting
        self._add_scalars(scalars, step)
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        parts = " ".join(f"{name} {value:.3f}" for name, value in named.items())
        self._bar.set_postfix_str(f"{parts}, {self._throughput}", refresh=False)
        self._bar.update()

    def end_epoch(self, row: Mapping[str, float | int]) -> None:
        """Add a row to results.csv, with the epoch's mean losses and seconds of training; absent columns stay empty."""
        seconds = self._earlier_s + self._throughput.took_s
        row = {**row, **_named(self._sum / max(1, self._count)), "seconds": seconds}
        self._sum, self._count, self._earlier_s = torch.zeros(3, dtype=torch.float64), 0, 0.0
        self._throughput.clear()  # or a checkpoint written now would add this epoch's time to the next one
        if not self._is_writer:
            return
        with warn_on_disk_error(self.folder / "results.csv"):
            add_row(self.folder / "results.csv", row)
        self._add_scalars({f"val/{name}": row[name] for name in ("AP", "AP50") if name in row}, int(row["step"]))

    def image(self, name: str, rgb: np.ndarray, step: int = 0) -> None:
        """Write (H, W, 3) uint8 as NAME.png and to TensorBoard."""
        if not self._is_writer:
            return
        with warn_on_disk_error(self.folder / f"{name}.png"):
            write_png(self.folder / f"{name}.png", rgb)
            if self._board is not None:
                self._board.add_image(name, rgb, step, dataformats="HWC")

    def save(self, name: str, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint into the folder. Returns whether that succeeded; if not, an earlier one is still there.

        Raises UserError once too many could not be written: the work would be lost.
        """
        if not self._is_writer:
            return True
        start, is_written = time.monotonic(), False
        with warn_on_disk_error(self.folder / name):
            checkpoint.to_file(self.folder / name)
            is_written = True
        # Also after an error: an immediate second try would fail, too.
        self._saved_at = time.monotonic()
        self._save_took_s = self._saved_at - start
        self.failures.note(name, is_written=is_written)
        return is_written

    def is_save_due(self, *, at_epoch_end: bool = False) -> bool:
        """Return whether last.pt should be written now: after `save_every_s`, or cheaply at the end of an epoch."""
        if not self._is_writer:
            return False
        passed_s = time.monotonic() - self._saved_at
        return passed_s > self.save_every_s or (at_epoch_end and passed_s * _SHARE_FOR_SAVING > self._save_took_s)

    def say(self, text: str) -> None:
        """Print without breaking the bar."""
        if self._is_writer:
            self._bar.write(text)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses and seconds of the unfinished epoch."""
        return {"sum": self._sum.clone(), "count": self._count, "seconds": self._earlier_s + self._throughput.took_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._count, self._earlier_s = state["sum"].clone(), state["count"], state["seconds"]

    def close(self) -> None:
        self._bar.close()
        with warn_on_disk_error(self.folder / "tensorboard"):
            if self._board is not None:
                self._board.close()

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write to TensorBoard. Give it up after an OSError: its writer does not recover."""
        if self._board is None:
            return
        try:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            self._board = None
            print(f"error: nothing more is written to TensorBoard ({error.strerror or error})", file=sys.stderr)


def _leave_to_the_writer(error: threading.ExceptHookArgs) -> None:
    """Print an error of a thread, but not one of a full disk: TensorBoard's raises it at the next call, too."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def _named(terms: Tensor) -> dict[str, float]:
    box, objectness, classes = terms.tolist()
    return {"loss": box + objectness + classes, "box": box, "objectness": objectness, "class": classes}
