"""Run cells side by side, each in its own process, which leaves nothing behind for the next."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from study.grid import Cell

Work = Callable[[Cell, Path], dict[str, Any]]
_LOG_LINES = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a cell. row: None if it failed; then log_tail is the end of its log."""

    cell: Cell
    row: dict[str, Any] | None
    log_tail: str


def run_cells(
    cells: Iterable[Cell],
    work: Work,
    *,
    jobs: int,
    may_start: Callable[[Cell], bool] = lambda _: True,
    start_method: str | None = None,
) -> Iterator[Outcome]:
    """Yield outcomes as cells finish, up to the first cell that may not start.

    work: (cell, folder that does not exist yet) -> row; it must be importable, because another process runs it. jobs=0:
    this one does. Whatever ends this generator ends the processes.
    """
    started = takewhile(may_start, cells)
    with tempfile.TemporaryDirectory(prefix="study-", ignore_cleanup_errors=True) as scratch:
        if jobs == 0:
            for number, cell in enumerate(started):
                yield Outcome(cell=cell, row=work(cell, Path(scratch) / str(number)), log_tail="")
            return
        pool = _Pool(work, Path(scratch), start_method or best_start_method())
        try:
            while True:
                while len(pool) < jobs and (following := next(started, None)) is not None:
                    pool.start(following)
                if not len(pool):
                    return
                yield from pool.finished()
        finally:
            pool.stop()


def best_start_method() -> str:
    """Return forkserver where it exists: its server has imported everything and never uses a GPU."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class _Pool:
    def __init__(self, work: Work, scratch: Path, start_method: str) -> None:
        self._context: Any = multiprocessing.get_context(start_method)  # the base class has no Process
        if start_method == "forkserver":
            root = str(Path(__file__).resolve().parent.parent)
            os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            self._context.set_forkserver_preload(["study.own", "study.presets"])
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._work, self._scratch = work, scratch
        self._at_work: dict[int, tuple[Any, Cell, Path]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._at_work)

    def start(self, cell: Cell) -> None:
        self._count += 1
        folder = self._scratch / str(self._count)
        folder.mkdir()
        process = self._context.Process(target=_in_process, args=(self._work, cell, folder))
        process.start()
        self._at_work[process.sentinel] = (process, cell, folder)

    def finished(self) -> Iterator[Outcome]:
        """Wait for at least one process to end, and yield the outcomes."""
        for sentinel in wait(list(self._at_work)):
            process, cell, folder = self._at_work.pop(int(sentinel))  # type: ignore[arg-type]
            process.join()
            written = folder / "row.json"
            row = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else None
            log_tail = "" if row else f"exit code {process.exitcode}\n{_end_of(folder / 'log.txt')}"
            shutil.rmtree(folder, ignore_errors=True)
            yield Outcome(cell=cell, row=row, log_tail=log_tail)

    def stop(self) -> None:
        for process, _, _ in self._at_work.values():
            process.terminate()
        for process, _, _ in self._at_work.values():
            process.join()


def _in_process(work: Work, cell: Cell, folder: Path) -> None:
    threading.Thread(target=_die_with_parent, args=(folder.parent,), daemon=True).start()
    signal.signal(signal.SIGTERM, _leave)
    log = open(  # noqa: SIM115 - as long as the process
        folder / "log.txt", "w", buffering=1, encoding="utf-8", errors="backslashreplace"
    )
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    _keep_to_one_thread()
    row = work(cell, folder / "run")
    part = folder / "row.part"
    part.write_text(json.dumps(row), encoding="utf-8")
    part.rename(folder / "row.json")


def _keep_to_one_thread() -> None:
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Leave through the exit handlers, which release what processes share."""
    raise SystemExit(143)


def _die_with_parent(scratch: Path) -> None:
    """End this process with its parent, which, killed by SIGKILL, can neither stop its cells nor clear up."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-_LOG_LINES:])
