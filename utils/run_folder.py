"""The folder of one run: made new, found again, marked as a torchrun job's."""

from __future__ import annotations

import itertools
import tempfile
from contextlib import suppress
from pathlib import Path

from utils.atomic_file import warn_on_disk_error
from utils.errors import UserError

RUNS = Path("runs")
_JOB = "torchrun_job.txt"


def free_folder(wanted: str | None, *, default: str, may_hold_files: bool = False) -> Path:
    """Make the folder of a new run. A typed one must not hold anything; the default one gets a number if taken."""
    if wanted is not None:
        folder = Path(wanted)
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not may_hold_files)):
            raise UserError(f"{folder}: is there already; name another folder (a training goes on with --resume)")
        return writable_folder(folder)
    runs = writable_folder(RUNS)
    folders = (runs / (f"{default}-{number}" if number > 1 else default) for number in itertools.count(1))
    return writable_folder(next(folder for folder in folders if _is_made(folder)))


def folder_of_job(job: str, wanted: str | None) -> Path | None:
    """Where this job had begun before torchrun started it anew; None where it has not come so far."""
    folders = [Path(wanted)] if wanted is not None else sorted(RUNS.glob("*"))
    begun = (folder for folder in folders if (folder / _JOB).is_file() and (folder / _JOB).read_text() == job)
    return next(begun, None)


def mark_folder(folder: Path, job: str) -> None:
    """As that of a job of several ranks, for `folder_of_job`."""
    if job:
        with warn_on_disk_error(folder / _JOB):
            (folder / _JOB).write_text(job)


def newest_run() -> Path:
    """The folder under runs/ whose last.pt is the newest. UserError where there is none."""
    saved = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise UserError(f"{RUNS.absolute()}: no run to go on with; name its folder after --resume")
    return saved[-1].parent


def writable_folder(folder: Path) -> Path:
    """The same, made where it is not there. UserError where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made, {error.strerror}") from error
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to, {error.strerror}") from error
    return folder


def _is_made(folder: Path) -> bool:
    """False where it was there, if only for a moment: of two runs that begin together, one makes it."""
    with suppress(FileExistsError):
        folder.mkdir()
        return True
    return False
