"""Graceful shutdown on SIGINT, SIGTERM and SIGHUP, and when nobody reads the output any more."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from types import FrameType
from typing import Any, ClassVar, TypeVar

Item = TypeVar("Item")


class Stopped(Exception):
    """The user has stopped the work. is_saved: whether what was done is saved, so that it can be resumed."""

    is_saved = True


class Stop:
    """A context in which a signal that would end the program sets `requested`, and a second one ends it at once.

    The second one runs no more Python, because the first may hang in a dead file system. A closing terminal hangs up
    several times, which counts once; under nohup it is ignored. Outside the main thread, which alone receives signals
    in Python, signals are left alone.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    active: ClassVar[Stop | None] = None  # the innermost context

    def __init__(self) -> None:
        self.requested = False
        self._handlers_before: dict[int, Any] = {}
        self._outer: Stop | None = None

    def __enter__(self) -> Stop:
        self._outer, Stop.active = Stop.active, self
        with suppress(ValueError):  # another thread
            for number in self.SIGNALS:
                if not (_is_hangup(number) and signal.getsignal(number) == signal.SIG_IGN):
                    self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        Stop.active = self._outer
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def until_requested(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items up to a request."""
        return takewhile(lambda _: not self.requested, items)

    def request(self, why: str = "") -> None:
        """Request a stop, and say so on the terminal. It may be called at any moment."""
        self.requested = True
        with suppress(OSError):  # the terminal may be closed
            # Not print: a signal may arrive in the middle of one.
            os.write(2, f"\n{why}stopping after this step; press again to end at once\n".encode())

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self.requested:
            self.request()
        elif not _is_hangup(number):
            os._exit(128 + number)


def _is_hangup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None)
