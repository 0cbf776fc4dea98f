"""The folder of one run, and everything that is written there while it runs."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.errors import UserError

COLUMNS = ("step", "epoch", "lr", "loss", "box", "objectness", "class", "AP", "AP50", "seconds")


def free_folder(wanted: str | None, *, default: str) -> Path:
    """Make the folder of a new run. A typed one must not hold anything; the default one gets a number if taken."""
    if wanted is not None:
        folder = Path(wanted)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is there already; name another folder (a training goes on with --resume)")
        return _made(folder)
    first = Path("runs") / default
    taken = (first.with_name(f"{first.name}-{number}") if number > 1 else first for number in range(1, 10_000))
    return _made(next(folder for folder in taken if not folder.exists()))


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made, {error.strerror}") from error
    return folder


class RunLog:
    """settings.json, results.csv (a row per epoch), TensorBoard scalars, and one progress bar over all steps."""

    def __init__(self, folder: Path, *, total_steps: int, first_step: int = 0) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        # Into a file or a pipe, a line every half minute is plenty.
        interval_s = 0.2 if sys.stderr.isatty() else 30
        self._epoch_losses: list[Tensor] = []
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            mininterval=interval_s,
            maxinterval=max(10, interval_s),
            dynamic_ncols=True,
        )

    def settings(self, settings: Mapping[str, Any]) -> None:
        (self.folder / "settings.json").write_text(json.dumps(settings, indent=2) + os.linesep)

    def losses(self, step: int, terms: Tensor, *, rate: float, epoch: str) -> None:
        """terms: (3,) box, objectness, class of optimizer step number `step` (from 1), per picture."""
        named = _named(terms)
        for name, value in (*named.items(), ("lr", rate)):
            self._board.add_scalar(f"train/{name}", value, step)
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix_str(f"loss {named['loss']:.3f}", refresh=False)
        self._bar.update()
        self._epoch_losses.append(terms)

    def take_mean_losses(self) -> dict[str, float]:
        """Mean over the steps since the last call."""
        mean = torch.stack(self._epoch_losses).mean(0)
        self._epoch_losses.clear()
        return _named(mean)

    def epoch(self, row: Mapping[str, float | int]) -> None:
        """A row of results.csv; columns that are absent stay empty."""
        path = self.folder / "results.csv"
        fresh = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        for name in ("AP", "AP50"):
            if name in row:
                self._board.add_scalar(f"val/{name}", row[name], row["step"])

    def say(self, line: str) -> None:
        """Print without breaking the bar."""
        self._bar.write(line)

    def close(self) -> None:
        self._bar.close()
        self._board.close()


def _named(terms: Tensor) -> dict[str, float]:
    box, objectness, classes = terms.tolist()
    return {"loss": box + objectness + classes, "box": box, "objectness": objectness, "class": classes}
