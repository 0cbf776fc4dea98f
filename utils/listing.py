"""Text files with one item per line."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError


def read_lines(file: Path) -> list[str]:
    """Return the lines that are not blank, stripped, without a byte-order mark. Raises UserError if unreadable."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error}).") from error
    return [line.strip() for line in lines if line.strip()]
