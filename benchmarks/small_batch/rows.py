"""Results as json lines, one cell a line, so that a killed grid goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows: two grids at once are then not noticed
    fcntl = None  # type: ignore[assignment]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole lines; one that a killed grid began is left out. UserError for a whole line that is no json."""
    if not path.is_file():
        return []
    return _parsed(path, path.read_bytes())


class RowFile:
    """Open for a grid: its rows so far, and `append`. Another grid on the same file is refused (UserError)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file, self.rows = _opened(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """One write, then to the disk: a reader sees the whole line, or one without an end, which does not count.

        UserError with the row in it where another file has the name by now, and cannot be written either.
        """
        missing = [json.loads(json.dumps(row))]  # as it will be read again
        if self._is_replaced():
            try:
                file, rows = _opened(self.path)
            except UserError as error:
                raise UserError(f"{error}; this row is not in it: {json.dumps(row)}") from error
            missing = [each for each in (*self.rows, *missing) if each not in rows]
            os.close(self._file)
            self._file, self.rows = file, rows
        os.write(self._file, b"".join(json.dumps(each).encode() + b"\n" for each in missing))
        os.fsync(self._file)
        self.rows += missing

    def _is_replaced(self) -> bool:
        """Whether another file has its name by now: `git stash` and `git pull` do that to files they know."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            return True

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def _opened(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Locked, with its rows. UserError where another grid has it, or a line is damaged."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        content = path.read_bytes()
        rows = _parsed(path, content)
        # The beginning of a line that was never finished would run into the next one.
        os.ftruncate(file, content.rfind(b"\n") + 1)
    except BlockingIOError as error:
        os.close(file)
        raise UserError(f"{path}: another grid is writing there") from error
    except UserError:
        os.close(file)
        raise
    return file, rows


def _parsed(path: Path, content: bytes) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: is not a row of json; mend or delete that line") from error
    return rows
