"""Where a resumed run continues."""

from __future__ import annotations

import pytest

from engine.trainer import place_of
from tests.toy_checkpoint import toy_checkpoint


def place_after(step: int, epochs_done: int, *, before: int | None = 16, now: int = 16, epochs: int) -> tuple[int, int]:
    """Of a run with batches of 4 images; before: images to train on, None in a checkpoint that does not say."""
    checkpoint = toy_checkpoint(step=step, epochs_done=epochs_done, train_images=before)
    return place_of(checkpoint, images=now, epoch_steps=now // 4, total_steps=epochs * now // 4)


@pytest.mark.parametrize("before", [16, None])
def test_the_same_images_go_on_in_the_same_epoch(before):
    assert place_after(6, 1, before=before, epochs=3) == (6, 1)
    assert place_after(8, 1, before=before, epochs=3) == (8, 1), "still to be measured"
    assert place_after(6, 2, before=before, epochs=3) == (6, 1), "the run ended there, and now does not"


@pytest.mark.parametrize("now", [4, 8, 12, 20, 24])
def test_with_more_or_fewer_images_no_epoch_is_empty(now):
    epochs, epoch_steps = 3, now // 4
    for step in range(1, 24):
        _, done = place_after(step, step // 4, now=now, epochs=epochs)
        starts = [epoch * epoch_steps for epoch in range(done, epochs)]
        assert all(max(start, step) < start + epoch_steps for start in starts)
        assert not starts or starts[0] <= step, "no batch is skipped"
        assert bool(starts) == (step < epochs * epoch_steps)
