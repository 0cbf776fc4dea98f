"""Speed of a training, and waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator

from engine.throughput import Throughput


def test_waiting_for_data_is_told_from_training():
    def slow() -> Iterator[list[int]]:
        for _ in range(3):
            time.sleep(0.03)
            yield [0, 0]

    speed = Throughput()
    for _ in range(2):
        speed.clear()
        for _ in speed.watch(slow()):
            time.sleep(0.01)
        assert speed.images == 6
        assert 0.5 < speed.share_waiting < 0.9


def test_a_speed_is_shown_until_the_next_is_measured():
    speed = Throughput()
    assert str(speed).startswith("speed not measured yet")
    for _ in speed.watch([[0, 0]] * 2):
        time.sleep(0.01)
    measured = str(speed)
    speed.clear()
    assert (
        " images/s" in measured
        and not measured.startswith("0.0 ")
        and str(speed).split(",")[0] == measured.split(",")[0]
    )
