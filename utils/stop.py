"""Ctrl-C and SIGTERM, heeded where nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")


class Stopped(Exception):
    """The work was left at a user's wish. is_kept: at a place from which it can go on."""

    is_kept = True


class Stop:
    """While this context is entered, a signal to end the program is a wish, `requested`; the second one ends it.

    The second ends it at once, without another line of Python, because the first may hang in a dead file system.
    Outside the main thread, where Python takes no signals, there are no wishes.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        try:
            self._before = {number: signal.signal(number, self._hear) for number in self.SIGNALS}
        except ValueError:
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def heeding(self, items: Iterable[Item]) -> Iterable[Item]:
        """The items, as often as they are iterated over; Stopped instead of the next one where a stop is requested."""
        return _Heeding(self, items)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        # Not print: a signal may arrive in the middle of one.
        os.write(2, b"\nstopping after this step; once more ends it at once\n")


class _Heeding(Iterable[Item]):
    def __init__(self, stop: Stop, items: Iterable[Item]) -> None:
        self._stop, self._items = stop, items

    def __iter__(self) -> Iterator[Item]:
        for item in self._items:
            if self._stop.requested:
                raise Stopped
            yield item
