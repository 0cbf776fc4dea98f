"""results.csv: a row per epoch, readable after a crash in the middle of a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.atomic_file import atomic_write

COLUMNS = ("step", "epoch", "lr", "loss", "box", "objectness", "class", "AP", "AP50", "seconds")


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row; absent columns stay empty. Raises ValueError for one that is not in COLUMNS, and OSError."""
    _write(path, [*_read(path), {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}])


def drop_rows_after(path: Path, epochs: int) -> None:
    """Drop the rows after so many epochs, which will be trained again, and incomplete rows."""
    if path.exists():
        _write(path, [row for row in _read(path) if int(row["epoch"]) <= epochs])


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    whole = (row for row in rows if row.keys() == set(COLUMNS) and None not in row.values())
    return [row for row in whole if row["epoch"].isdecimal()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
