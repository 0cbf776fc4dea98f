"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, *, verify: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """A file to write the new content of `path` to: temporary, flushed to disk, then renamed.

    A reader sees the old file or the new, never half; after an error, of `verify` too, which is given the temporary
    file, it is the old one.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it takes the place that others need
        raise
    _flush_name(path.parent)


@contextmanager
def warn_on_disk_error(path: Path) -> Iterator[None]:
    """An error of the disk becomes a line, and the rest of the block is left out: for what is not worth a training."""
    try:
        yield
    except OSError as error:
        print(f"error: {path} was not written ({error.strerror or error})", file=sys.stderr)


def _flush_name(folder: Path) -> None:
    """Without it, a power failure may bring the old file back, or none. Where folders cannot be flushed, nothing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
