"""One process per run folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none: nothing is locked there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # it stays in the folder: removing it would let a third process lock another file of this name
_held: dict[Path, BinaryIO] = {}


@contextmanager
def released_afterwards() -> Iterator[None]:
    """Give up, after the block, all folders that this process holds."""
    try:
        yield
    finally:
        for file in _held.values():
            file.close()
        _held.clear()


def hold(folder: Path) -> None:
    """Keep other processes out of the folder until it is released or this one ends, however it ends.

    Raises UserError, which names the other process, and OSError if the folder cannot be written to. A file system
    without locks is used without.
    """
    path = Path(os.path.realpath(folder)) / LOCK
    if fcntl is None or path in _held:
        return
    file = open(path, "a+b")  # noqa: SIM115 - as long as the process
    try:
        # Not flock: the loader's workers are forks, and would hold it for a second after this process was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # whichever the system has
        file.seek(0)
        owner = file.read(200).decode(errors="replace").strip() or "another process"
        file.close()
        raise UserError(f"{folder}: is in use by {owner}; wait until that has ended, or name another folder") from None
    except OSError:
        file.close()
        return
    _held[path] = file
    with suppress(OSError):  # a full disk has no room for the name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        file.flush()
