"""Whatever happens to a training, it ends to the bit as if nothing had, without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.chaos import SETUPS, Chaos
from tests.chaos.flips import FILES, flip


def assert_nothing_was_lost(tally: dict[str, int]) -> None:
    assert tally["bit-equal"] == tally["finished"] > 0, tally
    assert not any(tally[name] for name in ("tracebacks", "hangs", "wrong", "unequal")), tally


def test_a_training_survives_a_few(tmp_path: Path) -> None:
    kinds = ("kill", "damage", "disk")
    assert_nothing_was_lost(Chaos(tmp_path).run(3, setups=SETUPS[:1], kinds=kinds))


@pytest.mark.slow
def test_trainings_survive_two_hundred_events(tmp_path: Path) -> None:
    assert_nothing_was_lost(Chaos(tmp_path).run(200))


@pytest.mark.slow
def test_no_flipped_bit_of_two_thousand_is_loaded(tmp_path: Path) -> None:
    run = Chaos(tmp_path).whole(SETUPS[0])
    for name in FILES:
        tally = flip(run / name, 2000, seed=1)
        assert tally["refused"] > 1000 and not tally["wrong"] and not tally["tracebacks"], (name, tally)
