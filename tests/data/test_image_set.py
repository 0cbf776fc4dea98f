"""Samples of a set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.image_set import ImageSet
from tests.data.sets import noise_image_set


def assert_same_image(ours: ImageSet, at: int, theirs: ImageSet, index: int) -> None:
    one, other = ours[at], theirs[index]
    assert (one.path, one.image_id, one.hw) == (other.path, other.image_id, other.hw)
    for name in ("boxes", "labels", "is_crowd"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_a_sample_has_the_images_with_their_objects(noise_set: ImageSet) -> None:
    sample = noise_set.sample(7)
    assert len(sample) == len(set(sample.image_ids)) == 7
    for at, image_id in enumerate(sample.image_ids):
        assert_same_image(sample, at, noise_set, noise_set.image_ids.index(image_id))
    assert (sample.name, sample.split, sample.class_names) == (noise_set.name, noise_set.split, noise_set.class_names)
    assert len(sample.boxes) == sample.starts[-1]


def test_a_sample_is_always_the_same_and_the_beginning_of_a_larger_one(noise_set: ImageSet) -> None:
    assert noise_set.sample(5).image_ids == noise_set.sample(5).image_ids == noise_set.sample(9).image_ids[:5]


def test_a_sample_comes_from_all_over_the_set(tmp_path: Path) -> None:
    places = np.array(noise_image_set(tmp_path, 40).sample(10).image_ids) - 100
    assert list(places) != sorted(places)
    assert places.min() < 13 and places.max() > 26


def test_more_than_there_are_is_all_there_are(noise_set: ImageSet) -> None:
    assert sorted(noise_set.sample(100).image_ids) == sorted(noise_set.image_ids)


def test_a_sample_may_have_no_object(tmp_path: Path) -> None:
    sample = noise_image_set(tmp_path, 1).sample(1)
    assert (len(sample), len(sample.boxes), sample[0].boxes.shape) == (1, 0, (0, 4))
