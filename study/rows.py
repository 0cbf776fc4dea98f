"""Results as JSON lines, one per cell, so that a killed grid goes on where it stopped."""

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
    """Return all complete lines. Raises UserError for one that is not JSON; a line without an end does not count."""
    if not path.is_file():
        return []
    return _parsed(path, path.read_bytes())


class RowFile:
    """The file of a grid: its rows so far, and `append`. Raises UserError if another grid has it open."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file, self.rows = _opened(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a line by a single write, and sync it: a reader sees all of it, or a line without an end.

        Raises UserError, with the row in its message, if another file has taken the name and cannot be written either.
        """
        missing = [json.loads(json.dumps(row))]  # as it will be read again
        if self._is_replaced():
            try:
                file, rows = _opened(self.path)
            except UserError as error:
                raise UserError(f"{error}; this row is not in it: {json.dumps(row)}") from error
            missing = [old for old in (*self.rows, *missing) if old not in rows]
            os.close(self._file)
            self._file, self.rows = file, rows
        os.write(self._file, b"".join(json.dumps(line).encode() + b"\n" for line in missing))
        os.fsync(self._file)
        self.rows += missing

    def _is_replaced(self) -> bool:
        """Return whether another file has taken the name, as `git stash` and `git pull` do with tracked files."""
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
    """Return the locked file and its rows. Raises UserError if another grid has it or a line is damaged."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        content = path.read_bytes()
        rows = _parsed(path, content)
        # An unfinished line would run into the next one.
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
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: is not a row of JSON; correct or delete that line")
        rows.append(row)
    return rows
