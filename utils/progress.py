"""Progress of long work: a bar in a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_LINE_S = 30


class Progress:
    """A context manager around work on `total` images, 0 if nobody knows how many."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._began_s = self._said_s = time.monotonic()
        has_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(total=total or None, unit="image", leave=False, dynamic_ncols=True) if has_terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """Count an image."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif (now_s := time.monotonic()) - self._said_s > _LINE_S:
            self._said_s = now_s
            of_total = f" of {self._total:,}" if self._total else ""
            per_s = self._done / (now_s - self._began_s)
            print(f"{self._done:,}{of_total} images, {per_s:.1f} images/s", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text)
