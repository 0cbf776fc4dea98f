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
        self._open()

    def append(self, row: Mapping[str, Any]) -> None:
        """One write, then to the disk: a reader sees the whole line, or one without an end, which does not count."""
        earlier = self.rows
        if self._is_replaced():
            os.close(self._file)
            self._open()
        missing = [each for each in (*earlier, dict(row)) if each not in self.rows]
        os.write(self._file, b"".join(json.dumps(each).encode() + b"\n" for each in missing))
        os.fsync(self._file)
        self.rows += missing

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = self.path.read_bytes()
            self.rows = _parsed(self.path, content)
            # The beginning of a line that was never finished would run into the next one.
            os.ftruncate(self._file, content.rfind(b"\n") + 1)
        except BlockingIOError as error:
            os.close(self._file)
            raise UserError(f"{self.path}: another grid is writing there") from error
        except UserError:
            os.close(self._file)
            raise

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


def _parsed(path: Path, content: bytes) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: is not a row of json; mend or delete that line") from error
    return rows
