"""Progress of a study, and the time it may still take."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean
from typing import Any

from study.grid import Cell, Row


class Progress:
    """A line per cell. Times are estimated from finished cells that are as similar as possible."""

    def __init__(self, cells: Iterable[Cell], rows: Iterable[Row], *, jobs: int, deadline: float) -> None:
        """cells: all that are left, in whatever order. deadline: on time.monotonic()'s clock."""
        self._left = list(map(_without_rate, cells))
        self._total, self._jobs, self._deadline = len(self._left), max(1, jobs), deadline
        self._seconds: dict[tuple[Any, ...], list[float]] = {}
        for row in rows:
            self._learn(row)

    def ends_in_time(self, cell: Cell) -> bool:
        """Return whether a cell that starts now would end before the deadline, as far as is known."""
        return time.monotonic() + (self._estimate_s(cell) or 0) < self._deadline

    def done(self, cell: Cell, row: Row | None) -> str:
        """Count a cell, whose row is None if it failed. Returns a line that says so."""
        self._left.remove(_without_rate(cell))
        name = f"{cell.data} {cell.recipe}, {cell.mini_batch} a forward, seed {cell.seed}"
        result = "FAILED"
        if row is not None:
            self._learn(row)
            split = f"rate {cell.rate:g}, val" if row["test_AP"] is None else "test"
            ap = row["val_AP"] if row["test_AP"] is None else row["test_AP"]
            result = "diverged" if row["diverged"] else f"{split} AP {100 * ap:.1f}"
            result += f", {row['seconds']:.0f} s"
        count = self._total - len(self._left)
        return f"{time.strftime('%H:%M')} [{count}/{self._total}] {name}: {result}; {self.remaining()} left"

    def remaining(self) -> str:
        """Return the time left as h:mm, for this number of processes; ? if nothing is known."""
        estimates = [self._estimate_s(cell) for cell in self._left]
        if None in estimates:
            return "?"
        minutes = round(sum(filter(None, estimates)) / self._jobs / 60)
        return f"{minutes // 60}:{minutes % 60:02} h"

    def _learn(self, row: Row) -> None:
        for place in _places(row["data"], row["net"], row["recipe"], row["mini_batch"], row["steps"]):
            self._seconds.setdefault(place, []).append(row["seconds"] / row["steps"])

    def _estimate_s(self, cell: Cell) -> float | None:
        places = _places(cell.data, cell.net, cell.recipe, cell.mini_batch, cell.steps)
        known = next((self._seconds[place] for place in places if place in self._seconds), None)
        return None if known is None else fmean(known) * cell.steps


def _places(data: str, net: str, recipe: str, mini_batch: int, steps: int) -> list[tuple[Any, ...]]:
    """Return keys of the times to use, from the most similar cells to the least."""
    return [(data, net, recipe, mini_batch, steps), (data, net, mini_batch, steps), (net, mini_batch), (net,)]


def _without_rate(cell: Cell) -> Cell:
    """Rates of cells to come are not known yet."""
    return replace(cell, rate=0.0)
