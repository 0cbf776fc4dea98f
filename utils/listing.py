"""Text files that a user wrote or another program exported."""

from __future__ import annotations

import codecs
from pathlib import Path

from utils.errors import UserError

_MOST_BYTES = 1 << 28  # several million paths


def read_bounded(file: Path, most_bytes: int) -> bytes:
    """Return the bytes of a regular file. Raises UserError if it is none, unreadable, or has more than `most_bytes`.

    A FIFO or a device is not opened: reading it might never end.
    """
    if not file.is_file():
        raise UserError(f"{file}: is no regular file." if file.exists() else f"{file}: no such file.")
    try:
        with open(file, "rb") as stream:
            content = stream.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).") from error
    if len(content) > most_bytes:
        raise UserError(f"{file}: has {file.stat().st_size:,} bytes, at most {most_bytes:,} are read: divide it.")
    return content


def decoded(content: bytes, errors: str = "strict") -> str:
    """Decode UTF-8, or UTF-16 with its byte-order mark; marks are left out. Raises UnicodeDecodeError."""
    is_utf16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", errors)


def read_lines(file: Path) -> list[str]:
    """Return the lines that are not blank, stripped, without a byte-order mark. Raises UserError if unreadable."""
    try:
        lines = decoded(read_bounded(file, _MOST_BYTES)).splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read as text ({error}); save it as UTF-8.") from error
    return [line.strip() for line in lines if line.strip()]
