"""One cell: a training through train.py's own functions, then the test split, then what it cost."""

from __future__ import annotations

import csv
import datetime
import hashlib
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import train
from engine.job import Job, job_of
from engine.loss_watch import TrainingLost
from evaluation.evaluator import Evaluator
from study.grid import Cell, Grid
from study.memory import memory_of_batch
from study.recipes import record_of, settings_of
from study.splits import Splits, open_splits
from utils.checkpoint import Checkpoint
from utils.environment import describe, pick_device
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Data of a cell, and all settings that are typed for train.py, by name, but those that the cell itself makes."""

    path: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A grid, and what its cells and its folder need.

    setup: what all rows must share, by name. command: what to type for a recipe, images in a forward and a rate; None:
    no advice is given. paths: of rows, table, plot and figures, by their endings.
    """

    title: str
    grid: Grid
    source_of: Callable[[Cell], Source]
    paths: Mapping[str, Path]
    setup: Mapping[str, Any] = field(default_factory=dict)
    command: Callable[[str, int, float], str] | None = None


def run_cell(
    cell: Cell, folder: Path, *, source_of: Callable[[Cell], Source], more: Mapping[str, Any], commit: str
) -> dict[str, Any]:
    """Train and evaluate a cell, and return its row.

    The test split is measured once the best weights are written, and never in tuning. folder: of the run, created here.
    more: settings that change no result, such as the device. commit: of the code as loaded; files may have changed.
    """
    start = time.monotonic()
    source = source_of(cell)
    splits = open_splits(source.path, source.settings.get("classes", ()))
    job = job_of_cell(cell, source, splits, more)
    options = job.options
    row: dict[str, Any] = {**asdict(cell), "settings": record_of(options.norm), "diverged": False}
    row |= {"val_AP": 0.0, "test_AP": None, "test_AP50": None}
    try:
        train.train(job, folder)
        detector = train.finish(job, folder).detector
        check_memory(job, folder)
        row["val_AP"] = round(Checkpoint.from_file(folder / "best.pt").best_ap, 5)
        if cell.role == "main":
            batch = options.optim.batch_size
            table = Evaluator(detector, splits.test, batch_size=batch, workers=options.workers).measure()
            row |= {"test_AP": round(table.AP, 5), "test_AP50": round(table.AP50, 5)}
        row |= trained(folder)
    except TrainingLost:
        row["diverged"] = True  # a result: it scores 0
        row |= {"test_AP": 0.0, "test_AP50": 0.0} if cell.role == "main" else {}
    row |= memory_of_batch(job, step=cell.steps - 1)
    row |= {"seconds": round(time.monotonic() - start, 1), "commit": commit, "date": datetime.date.today().isoformat()}
    return {**row, "machine": describe(pick_device(options.device))}


def job_of_cell(cell: Cell, source: Source, splits: Splits, more: Mapping[str, Any]) -> Job:
    """Return the job as train.py makes it from typed flags."""
    given = {
        **source.settings,
        **more,
        "data": source.path,
        "seed": cell.seed,
        "subdivisions": source.settings["batch_size"] // cell.mini_batch,
        "learning_rate": cell.rate,
        **settings_of(cell.recipe),
    }
    return job_of(given, (splits.train, splits.val))


def check_memory(job: Job, folder: Path) -> None:
    """Raise UserError if memory ran out, so that train.py went on with fewer images in a forward than asked for."""
    ended = Checkpoint.from_file(folder / "last.pt").training
    if ended is not None and ended.subdivisions != job.options.optim.subdivisions:
        raise UserError(f"{job.mini_batch} images in a forward did not fit into memory")


def trained(folder: Path) -> dict[str, Any]:
    """Return speed, loss and first batch, read from the run's files.

    step_s: seconds of an optimizer step with its loading, in the fastest epoch after the first and before any freeze,
    because other processes can only slow an epoch down. first_batch: a hash of its image, equal in runs on the same
    images.
    """
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        epochs = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    paces = [
        row["seconds"] / (row["step"] - before["step"])
        for before, row in pairwise([{"step": 0.0}, *epochs])
        if row["step"] <= 0.7 * epochs[-1]["step"]
    ]
    step_s = min(paces[1:] or paces or [epochs[0]["seconds"] / epochs[0]["step"]])
    return {
        "step_s": round(step_s, 5),
        "train_loss": round(epochs[-1]["loss"], 4),
        "first_batch": hashlib.sha256((folder / "first_batch.png").read_bytes()).hexdigest()[:12],
    }


def code_version() -> str:
    """Return the commit of this code, with "+changes" if files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
