"""A list in a json file that grows, and is valid json after each row, whatever ends the program."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_END = b"\n]\n"


class JsonList:
    """A json file with one row a line. Raises OSError as files do; of a full disk the rows before it are kept."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by `close`
        self._write(0, b"[" + _END)
        self._is_empty = True

    def append(self, row: Any) -> None:
        """Write a row over the list's end, and the end again, in one call of the system."""
        start = self._file.seek(-len(_END), os.SEEK_END)
        text = json.dumps(row, separators=(", ", ": ")).encode()
        self._write(start, (b"\n" if self._is_empty else b",\n") + text + _END)
        self._is_empty = False

    def close(self) -> None:
        self._file.close()

    def _write(self, start: int, content: bytes) -> None:
        try:
            self._file.seek(start)
            done = self._file.write(content)
            while done < len(content):  # the disk is full, or a signal came
                done += self._file.write(content[done:])
        except OSError:
            if start:
                self._file.truncate(start)
                self._file.seek(start)
                self._file.write(_END)  # there is room for: it was there
            raise
