"""Progress of long work: a bar in a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from utils.duration import in_words

_LINE_S = 30


class Progress:
    """A context manager around work on `total` units, such as images; None or 0 if nobody knows how many.

    label: what is done, before the numbers. done: how many were done before. stays: the bar stays when the work ends.
    """

    def __init__(
        self,
        total: int | None,
        *,
        unit: str = "image",
        label: str = "",
        done: int = 0,
        stays: bool = False,
        is_shown: bool = True,
    ) -> None:
        self.total = total
        self._unit, self._label, self._before, self._done, self._is_shown = unit, label, done, done, is_shown
        self._began_s = self._said_s = time.monotonic()
        self._bar: tqdm[None] | None = None
        if is_shown and sys.stderr is not None and sys.stderr.isatty():
            # Not before the first unit is done: other lines come first.
            look = {"dynamic_ncols": True, "mininterval": 0.2, "delay": 1e-6, "leave": stays}
            self._bar = tqdm(total=total or None, initial=done, unit=unit, desc=label or None, **look)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count what was done. note: is shown after the numbers."""
        self._done += count
        if self._bar is not None:
            self._bar.total = self.total or None
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._is_shown and (now_s := time.monotonic()) - self._said_s > _LINE_S:
            self._said_s = now_s
            print(self._line(now_s, note), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._is_shown:
            print(text)

    def _line(self, now_s: float, note: str) -> str:
        """Return such as "evaluating: 481 of 1,500 images, 16.0 images/s, 1 min left"."""
        per_s = (self._done - self._before) / (now_s - self._began_s)
        parts = [f"{self._done:,}{f' of {self.total:,}' if self.total else ''} {self._unit}s"]
        parts.append(f"{per_s:.1f} {self._unit}s/s")
        if self.total and self.total > self._done:
            parts.append(f"{in_words((self.total - self._done) / per_s)} left")
        return (f"{self._label}: " if self._label else "") + ", ".join([*parts, *filter(None, [note])])
