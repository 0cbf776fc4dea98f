"""Losses and time of the epoch at hand, with its part before a resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.throughput import Throughput
from utils.structures import Batch


class EpochRecord:
    """Sums up an epoch, and begins the next one with `take`."""

    def __init__(self) -> None:
        self.throughput = Throughput()
        self._sum, self._count = torch.zeros(3, dtype=torch.float64), 0
        self._earlier_s = 0.0  # in this epoch, before the run was resumed

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of the epoch, and time them."""
        self.throughput.clear()
        yield from self.throughput.watch(batches)

    def add(self, losses: Tensor) -> None:
        """Add the (3,) losses of a step: box, objectness, class."""
        self._sum += losses.double()
        self._count += 1

    def take(self) -> dict[str, float]:
        """Return the epoch's mean losses and the seconds of its training, and forget them."""
        row = {**named(self._sum / max(1, self._count)), "seconds": self._seconds}
        self._sum, self._count, self._earlier_s = torch.zeros(3, dtype=torch.float64), 0, 0.0
        self.throughput.clear()  # or a checkpoint written now would add this epoch's time to the next one
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum.clone(), "count": self._count, "seconds": self._seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._count, self._earlier_s = state["sum"].clone(), state["count"], state["seconds"]

    @property
    def _seconds(self) -> float:
        return self._earlier_s + self.throughput.took_s


def named(losses: Tensor) -> dict[str, float]:
    """Return the (3,) losses by name, with their sum."""
    box, objectness, classes = losses.tolist()
    return {"loss": box + objectness + classes, "box": box, "objectness": objectness, "class": classes}
