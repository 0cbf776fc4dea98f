"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.printable import printable


@contextmanager
def atomic_write(path: Path, *, verify: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary file for the new content of `path`, which is flushed to disk and then renamed.

    A reader sees the old file or the new one, never a part. The old one stays after any error, including one that
    `verify` raises, which is called with the temporary file. A symbolic link stays one: its target is replaced.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # a full disk has no room for it
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write does not tell; an error of ours has its sentence
        raise
    _flush_name(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 atomically, creating the folder; half surrogates are escaped. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


@contextmanager
def warn_on_disk_error(path: Path) -> Iterator[None]:
    """Report an OSError on stderr and leave the block: losing this file must not end the run."""
    try:
        yield
    except OSError as error:
        print(printable(f"error: {path} was not written ({error.strerror or error})"), file=sys.stderr)


def _flush_name(folder: Path) -> None:
    """Make the renaming durable against power failure, on systems that can flush folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
