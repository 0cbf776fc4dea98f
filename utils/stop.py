"""Graceful shutdown on SIGINT and SIGTERM."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")


class Stopped(Exception):
    """The user has stopped the work. is_saved: whether what was done is saved, so that it can be resumed."""

    is_saved = True


class Stop:
    """A context in which a signal that would end the program sets `requested`, and a second one ends it at once.

    The second one runs no more Python, because the first may hang in a dead file system. Outside the main thread, which
    alone receives signals in Python, the context changes nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        with suppress(ValueError):  # another thread
            self._handlers_before = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def until_requested(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items up to a request."""
        return takewhile(lambda _: not self.requested, items)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        # Not print: the signal may arrive in the middle of one.
        os.write(2, b"\nstopping after this step; press again to end at once\n")
