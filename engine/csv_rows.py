"""A csv file of an epoch's rows, readable after a crash in the middle of a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.atomic_file import atomic_write


class CsvRows:
    """The file at `path` with these columns, among them `epoch`. Raises OSError, and ValueError for another column."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; absent columns, and those that are None, stay empty."""
        new = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        self._write([*self._read(), *new])

    def drop_after(self, epochs: int) -> None:
        """Drop the rows after so many epochs, which will be trained again, and incomplete rows."""
        if self.path.exists():
            self._write([row for row in self._read() if int(row["epoch"]) <= epochs])

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
        whole = (row for row in rows if row.keys() == set(self.columns) and None not in row.values())
        return [row for row in whole if row["epoch"].isdecimal()]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(self.path) as file:
            file.write(text.getvalue().encode())
