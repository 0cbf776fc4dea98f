"""Speed of a training, and the share of time that it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from utils import ranks
from utils.memory import peak_memory
from utils.structures import Batch


class Throughput:
    """Counts the batches watched since the last `clear`: images of all ranks, waiting time of this one."""

    def __init__(self) -> None:
        self._in_words = "speed not measured yet"
        self.clear()

    def clear(self) -> None:
        self.waited_s, self.took_s, self.images, self.steps = 0.0, 0.0, 0, 0

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; the time that `batches` takes for the next one counts as waiting."""
        arriving = iter(batches)
        asked_at = time.monotonic()
        while (batch := next(arriving, None)) is not None:
            self.waited_s += time.monotonic() - asked_at
            yield batch
            now = time.monotonic()
            self.took_s, asked_at = self.took_s + now - asked_at, now
            self.images += len(batch) * ranks.world_size()
            self.steps += 1

    @property
    def images_per_s(self) -> float:
        return self.images / self.took_s if self.took_s else 0.0

    @property
    def share_waiting(self) -> float:
        return min(1.0, self.waited_s / self.took_s) if self.took_s else 0.0  # the batch at hand has only waited yet

    def __str__(self) -> str:
        if self.took_s:  # or what was measured before the last `clear`
            self._in_words = f"{self.images_per_s:.1f} images/s, {self.share_waiting:.0%} waiting for data"
        return f"{self._in_words}{peak_memory()}"
