"""The folder of a run: created, locked, found again for a resume, marked as a torchrun job's."""

from __future__ import annotations

import tempfile
from pathlib import Path

from utils.atomic_file import warn_on_disk_error
from utils.errors import UserError
from utils.file_name import as_file_name
from utils.run_lock import LOCK, hold

RUNS = Path("runs")
_JOB = "torchrun_job.txt"


def free_folder(name: str | None, *, default: str, may_hold_files: bool = False) -> Path:
    """Create the folder of a new run: `name`, which must not hold files, or runs/`default` with a number if taken.

    default: of names of data and networks, which become a safe one. No other process may use the folder until this one
    ends. Raises UserError.
    """
    if name is not None:
        folder = Path(name)
        if (folder / LOCK).exists():  # in use, or a run began there and wrote nothing
            own_folder(folder)
        if folder.exists() and (not folder.is_dir() or (_holds_files(folder) and not may_hold_files)):
            raise UserError(f"{folder}: already exists; name another folder with --out (--resume continues a training)")
        return own_folder(folder)
    default = as_file_name(default)
    folder, number = writable_folder(RUNS) / default, 1
    while True:
        try:
            folder.mkdir()  # of two runs that start together only one succeeds
            return own_folder(folder)
        except FileExistsError:
            number += 1
            folder = RUNS / f"{default}-{number}"


def _holds_files(folder: Path) -> bool:
    return any(path.name != LOCK for path in folder.iterdir())


def own_folder(folder: Path) -> Path:
    """Return the folder, created if needed, which no other process may use until this one ends. Raises UserError."""
    writable_folder(folder)
    try:
        hold(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to, {error.strerror}") from error
    return folder


def folder_of_job(job: str, name: str | None) -> Path | None:
    """Return the folder this job had made before torchrun restarted it, or None."""
    folders = [Path(name)] if name is not None else sorted(RUNS.glob("*"))
    made = (
        folder for folder in folders if (folder / _JOB).is_file() and (folder / _JOB).read_text(encoding="utf-8") == job
    )
    return next(made, None)


def mark_folder(folder: Path, job: str) -> None:
    """Mark the folder as this job's, for `folder_of_job`; a no-op for a world size of 1, whose job is ""."""
    if job:
        with warn_on_disk_error(folder / _JOB):
            (folder / _JOB).write_text(job, encoding="utf-8")


def newest_run() -> Path:
    """Return the folder under runs/ with the newest last.pt of a run that has not finished, or of any if all have.

    Raises UserError if there is none.
    """
    runs = list(RUNS.glob("*/last.pt"))
    unfinished = [path for path in runs if not (path.parent / "metrics.json").exists()]
    newest = max(unfinished or runs, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"{RUNS.absolute()}: no run to resume; name its folder after --resume")
    return newest.parent


def writable_folder(folder: Path) -> Path:
    """Return the folder, created if needed. Raises UserError if it cannot be created or written to."""
    attempt = "created"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        attempt = "written to"
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be {attempt}, {error.strerror}") from error
    return folder
