"""What the demonstration of leakage rests on: mini-batches of one scene, and frames that do not tell their class."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.leakage import FRAMES, INKS, MINI_BATCH, SUBDIVISIONS, SceneBatches, draw_frame, table
from data.loader import InputSizes


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.sampled_from([1, 2, 4]))
def test_mini_batches_are_of_one_scene_and_an_epoch_shows_each_frame_once(seed: int, epoch: int, ranks: int):
    images, sizes = 16 * FRAMES, InputSizes((32, 32))
    split = {"batch_size": MINI_BATCH * SUBDIVISIONS * ranks, "ranks": ranks}
    epochs = [
        list(SceneBatches(images, sizes=sizes, seed=seed, epoch=epoch, rank=rank, **split)) for rank in range(ranks)
    ]
    keys = [key for batches in epochs for batch in batches for key in batch]
    assert sorted(key.image for key in keys) == list(range(images))
    assert sorted(key.position for key in keys) == list(range(images))
    for batch in (batch for batches in epochs for batch in batches):
        scenes = np.array([key.image // FRAMES for key in batch]).reshape(SUBDIVISIONS, MINI_BATCH)
        assert (scenes == scenes[:, :1]).all()


@pytest.mark.parametrize("ink", [(0, 0, 0), *INKS.values()])
def test_only_the_ink_of_a_frame_that_is_not_dark_has_a_colour(ink: tuple[float, ...]):
    digit = np.pad(np.ones((6, 6), np.float32), 1)
    image, (left, top, right, bottom) = draw_frame(np.random.default_rng(0), digit, np.array(ink))
    inside = np.zeros(image.shape[:2], bool)
    inside[int(top) : int(bottom), int(left) : int(right)] = True
    colour = image.max(axis=2).astype(int) - image.min(axis=2)
    assert colour[~inside].max() <= 1
    assert (colour[inside].mean() > 20) == any(ink)


def test_the_table_has_a_line_per_treatment_with_means_over_seeds():
    row = {"ranks": 2, "treatment": "scenes, bn", "train_class_loss": 1.0, "inference_class_loss": 2.0}
    rows = [{**row, "test_AP": ap, "test_AP50": 0.5} for ap in (0.1, 0.3)]
    assert table(rows).splitlines()[2:] == ["| scenes, bn | 2 | 2 | 1.00 | 2.00 | 20.0 (10.0 to 30.0) | 50.0 |"]
