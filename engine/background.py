"""A thread for what listens: what takes long there takes no time of the training."""

from __future__ import annotations

import queue
import threading
from typing import Any

from engine.events import Event, Listener, Record, Run, failure
from utils.console import warn

_MOST_WAITING = 10_000  # events
_LAST_S = 30.0  # that a listener may take at the end for what it has not done yet


class Background(Listener):
    """Tells a listener in a thread of its own.

    If it is far behind, as when a network is slow, steps and epochs are left out. At the end it is waited for, but not
    for long.
    """

    def __init__(self, listener: Listener, name: str, *, last_s: float = _LAST_S) -> None:
        self._listener, self._name, self._last_s = listener, name, last_s
        self._waiting: queue.Queue[tuple[Event, tuple[Any, ...]]] = queue.Queue(_MOST_WAITING)
        self._left_out = 0
        # A daemon: a listener that hangs does not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)

    def start(self, run: Run) -> None:
        self._thread.start()
        self._tell("start", run)

    def step(self, record: Record) -> None:
        self._tell("step", record)

    def epoch(self, record: Record) -> None:
        self._tell("epoch", record)

    def evaluation(self, record: Record) -> None:
        self._tell("evaluation", record)

    def end(self) -> None:
        self._finish("end")

    def error(self, error: BaseException) -> None:
        self._finish("error", error)

    def _tell(self, event: Event, *what: Any) -> None:
        try:
            self._waiting.put_nowait((event, what))
        except queue.Full:
            self._left_out += self._thread.is_alive()  # else it has failed, which was said

    def _finish(self, event: Event, *what: Any) -> None:
        if not self._thread.is_alive():
            return
        if self._waiting.full():  # the last event is worth more than the oldest
            self._waiting.get()
        self._tell(event, *what)
        self._thread.join(self._last_s)
        if self._thread.is_alive():
            warn(f"{self._name} is not done after {self._last_s:g} s: what it has not logged yet is lost")
        elif self._left_out:
            warn(f"{self._name} was too slow: {self._left_out} steps are not logged there")

    def _work(self) -> None:
        event: Event = "start"
        while event not in ("end", "error"):
            event, what = self._waiting.get()
            try:
                getattr(self._listener, event)(*what)
            except BaseException as error:  # SystemExit, too: some libraries end the program where a key is missing
                warn(failure(self._name, error))
                return
