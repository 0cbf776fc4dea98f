"""Text files that list something, a line each."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError


def read_lines(file: Path) -> list[str]:
    """The lines that are not blank, stripped; a byte-order mark is no part of them. UserError if unreadable."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error}).") from error
    return [line.strip() for line in lines if line.strip()]
