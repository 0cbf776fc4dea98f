"""Everything that a training writes into its run folder while it runs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine.results_csv import add_row, drop_rows_after
from engine.throughput import Throughput
from utils import ranks
from utils.atomic_file import warn_on_disk_error
from utils.checkpoint import Checkpoint
from utils.draw import write_png
from utils.structures import Batch

_SHARE_FOR_SAVING = 0.05  # of the time, at most, for checkpoints at the ends of short epochs
_WARM_UP_STEPS, _PACE_STEPS = 3, 5


class RunLog:
    """Checkpoints, settings.json, results.csv (a row per epoch), TensorBoard, and one progress bar over all steps.

    Of several ranks the first one writes and prints; the others keep quiet. What a full disk does not take is left
    out with a line, and the training goes on.

    epochs_done: rows of later ones, which a run that was killed had written, are dropped.
    """

    def __init__(
        self, folder: Path, *, total_steps: int, first_step: int = 0, epochs_done: int = 0, save_every_s: float = 600
    ) -> None:
        self.folder, self.total_steps, self.save_every_s = folder, total_steps, save_every_s
        self._speaks = ranks.is_rank_zero()
        self._board: SummaryWriter | None = None
        if self._speaks:
            folder.mkdir(parents=True, exist_ok=True)
            with warn_on_disk_error(folder / "results.csv"):
                drop_rows_after(folder / "results.csv", epochs_done)
            with warn_on_disk_error(folder / "tensorboard"):
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        # Into a file or a pipe, a line every half minute is plenty.
        interval_s = 0.2 if sys.stderr.isatty() else 30
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            mininterval=interval_s,
            maxinterval=max(10, interval_s),
            dynamic_ncols=True,
            disable=not self._speaks,
        )
        self._sum, self._count = torch.zeros(3, dtype=torch.float64), 0
        self._earlier_s = 0.0  # of this epoch, before the run was resumed
        self._pace, self._first_pace = Throughput(), Throughput()
        self._watched = 0  # batches since the run began or went on
        self._saved_at, self._save_took_s = time.monotonic(), 0.0

    def settings(self, settings: Mapping[str, Any]) -> None:
        if not self._speaks:
            return
        with warn_on_disk_error(self.folder / "settings.json"):
            (self.folder / "settings.json").write_text(json.dumps(settings, indent=2) + os.linesep)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an epoch; after the first few of all, a line that says how long it will take."""
        self._pace.clear()
        return self._saying_pace(self._pace.watch(batches))

    def _saying_pace(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The first steps allocate, start workers, compile and choose algorithms: they do not count."""
        pace = self._first_pace
        for batch in pace.watch(batches):
            if self._watched == _WARM_UP_STEPS:
                pace.clear()
            if self._watched == _WARM_UP_STEPS + _PACE_STEPS:
                self.say(f"speed     {pace}; {pace.hours_for(self.total_steps - self._bar.n)} h to go")
            self._watched += 1
            yield batch

    def losses(self, step: int, terms: Tensor, *, rate: float, epoch: str) -> None:
        """terms: (3,) box, objectness, class of optimizer step number `step` (from 1), per image."""
        named = _named(terms)
        self._sum += terms.double()
        self._count += 1
        with self._on_board():
            for name, value in (*named.items(), ("lr", rate)):
                self._scalar(f"train/{name}", value, step)
            if self._pace.steps:
                self._scalar("speed/images_per_s", self._pace.images_per_s, step)
                self._scalar("speed/share_waiting_for_data", self._pace.share_waiting, step)
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        parts = " ".join(f"{name} {value:.3f}" for name, value in named.items())
        self._bar.set_postfix_str(f"{parts}, {self._pace}", refresh=False)
        self._bar.update()

    def end_epoch(self, row: Mapping[str, float | int]) -> None:
        """A row of results.csv, with the epoch's mean losses and its seconds in training; absent columns stay empty."""
        seconds = self._earlier_s + self._pace.took_s
        row = {**row, **_named(self._sum / max(1, self._count)), "seconds": seconds}
        self._sum, self._count, self._earlier_s = torch.zeros(3, dtype=torch.float64), 0, 0.0
        self._pace.clear()  # or a checkpoint made now would count this epoch's time to the next one
        if not self._speaks:
            return
        with warn_on_disk_error(self.folder / "results.csv"):
            add_row(self.folder / "results.csv", row)
        with self._on_board():
            for name in ("AP", "AP50"):
                if name in row:
                    self._scalar(f"val/{name}", row[name], int(row["step"]))

    def image(self, name: str, rgb: np.ndarray, step: int = 0) -> None:
        """(H, W, 3) uint8, as NAME.png and in TensorBoard."""
        if not self._speaks:
            return
        with warn_on_disk_error(self.folder / f"{name}.png"):
            write_png(self.folder / f"{name}.png", rgb)
            if self._board is not None:
                self._board.add_image(name, rgb, step, dataformats="HWC")

    def keep(self, name: str, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint into the folder -> whether it is there now; if not, an earlier one still is."""
        if not self._speaks:
            return True
        begun, is_kept = time.monotonic(), False
        with warn_on_disk_error(self.folder / name):
            checkpoint.to_file(self.folder / name)
            is_kept = True
        # After an error, too: what failed now will fail again at once.
        self._saved_at = time.monotonic()
        self._save_took_s = self._saved_at - begun
        return is_kept

    def is_save_due(self, *, at_epoch_end: bool = False) -> bool:
        """Whether a last.pt would be worth its time now: after minutes, and at the end of an epoch."""
        if not self._speaks:
            return False
        passed_s = time.monotonic() - self._saved_at
        return passed_s > self.save_every_s or (at_epoch_end and passed_s * _SHARE_FOR_SAVING > self._save_took_s)

    def say(self, line: str) -> None:
        """Print without breaking the bar."""
        if self._speaks:
            self._bar.write(line)

    def state_dict(self) -> dict[str, Any]:
        """Of the epoch that is not over."""
        return {"sum": self._sum.clone(), "count": self._count, "seconds": self._earlier_s + self._pace.took_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._count, self._earlier_s = state["sum"].clone(), state["count"], state["seconds"]

    def close(self) -> None:
        self._bar.close()
        with self._on_board():
            if self._board is not None:
                self._board.close()

    @contextmanager
    def _on_board(self) -> Iterator[None]:
        """Its writer, once it has failed, fails for ever."""
        try:
            yield
        except OSError as error:
            self._board = None
            print(f"error: TensorBoard has nothing more from here on ({error.strerror or error})", file=sys.stderr)

    def _scalar(self, name: str, value: float, step: int) -> None:
        if self._board is not None:
            self._board.add_scalar(name, value, step)


def _named(terms: Tensor) -> dict[str, float]:
    box, objectness, classes = terms.tolist()
    return {"loss": box + objectness + classes, "box": box, "objectness": objectness, "class": classes}
