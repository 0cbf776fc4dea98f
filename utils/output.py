"""Standard output and standard error that outlive a full disk and a closed terminal."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from utils.errors import FULL
from utils.printable import printable
from utils.stop import Stop


def outlive_disk_and_reader() -> None:
    """Replace sys.stdout and sys.stderr: what does not fit on a full disk is dropped.

    When the reader has gone, as after `| head` or with a closed terminal, an active `Stop` is requested, or
    BrokenPipeError raised. A stream that was closed before the start (`2>&-`) writes to nowhere. Text that cannot be
    encoded is escaped, and control characters on stdout.
    """
    for number in range(3):  # or the next file that is opened would be standard error
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (_lasting(stream) for stream in (sys.stdout, sys.stderr))


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):  # somebody's own
        return stream
    stream.reconfigure(errors="backslashreplace")
    try:
        raw = _Output(stream.fileno(), "w", closefd=False)
    except OSError:  # in memory
        return stream
    if type(stream) is not io.TextIOWrapper:  # somebody's own
        return stream
    stream.flush()
    kind = _Lines if stream is sys.stdout else io.TextIOWrapper  # progress bars, on stderr, move the cursor
    return kind(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,  # in a file as well: somebody may be watching it
        write_through=stream.write_through,
    )


class _Lines(io.TextIOWrapper):
    """Text without control characters, which a terminal would obey: typed paths may have them, and names in files."""

    def write(self, text: str) -> int:
        super().write("\n".join(map(printable, text.split("\n"))))
        return len(text)


class _Output(io.FileIO):
    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in FULL:
                if Stop.active is None:
                    raise BrokenPipeError(error.errno, error.strerror) from None
                if not Stop.active.requested:
                    Stop.active.request("nobody reads the output any more: ")
            return memoryview(data).nbytes  # type: ignore[arg-type]
