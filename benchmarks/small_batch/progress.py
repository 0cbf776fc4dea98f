"""Progress of a grid, and the time it may still take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from benchmarks.small_batch.grid import Cell


class Progress:
    """A line per cell. The time left is estimated from finished cells of the same data, net and mini-batch."""

    def __init__(self, cells: Iterable[Cell], rows: Iterable[Mapping[str, Any]], *, jobs: int) -> None:
        self._left = list(cells)
        self._total = len(self._left)
        self._jobs = max(1, jobs)
        self._seconds: dict[tuple[Any, ...], list[float]] = {}
        for row in rows:
            self._learn(row)

    def done(self, cell: Cell, row: Mapping[str, Any] | None) -> str:
        self._left.remove(cell)
        mosaic = " mosaic" if cell.mosaic else ""
        name = f"{cell.data} {cell.net} {cell.recipe}{mosaic}, mini-batch {cell.mini_batch}, seed {cell.seed}"
        result = "FAILED"
        if row is not None:
            self._learn(row)
            ap = row["test_AP"] if row["test_AP"] is not None else row["val_AP"]
            split = "test" if row["test_AP"] is not None else f"rate {cell.rate:g}, val"
            result = "diverged" if row["diverged"] else f"{split} AP {100 * ap:.1f}"
            result += f", {row['seconds']:.0f} s"
        count = self._total - len(self._left)
        return f"{time.strftime('%H:%M')} [{count}/{self._total}] {name}: {result}; {self.remaining()} left"

    def remaining(self) -> str:
        """Return the time left as h:mm, for this number of processes."""
        minutes = round(sum(self._estimate_s(cell) for cell in self._left) / self._jobs / 60)
        return f"{minutes // 60}:{minutes % 60:02}"

    def _learn(self, row: Mapping[str, Any]) -> None:
        for place in self._places(row["data"], row["net"], row["mini_batch"], row["steps"]):
            self._seconds.setdefault(place, []).append(row["seconds"] / row["steps"])

    def _estimate_s(self, cell: Cell) -> float:
        places = self._places(cell.data, cell.net, cell.mini_batch, cell.steps)
        known = next((self._seconds[place] for place in places if place in self._seconds), [0.1])
        return fmean(known) * cell.steps

    @staticmethod
    def _places(data: str, net: str, mini_batch: int, steps: int) -> list[tuple[Any, ...]]:
        """Return keys of the times to use, from the most similar cells to the least."""
        return [(data, net, mini_batch, steps), (net, mini_batch, steps), (net, mini_batch), (net,)]
