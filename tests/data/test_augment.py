from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

import data.augment
from data.albumentations_import import albumentations as A
from data.augment import Augmenter
from data.augment_options import AugmentOptions
from data.photometric import photometric_transforms
from tests.data.test_geometry import extent, rectangle
from utils.errors import UserError
from utils.structures import Sample

PLAIN = AugmentOptions(mosaic=0, saturation=1, exposure=1, hue=0, fill=(0, 0, 0))
STILL = AugmentOptions(mosaic=0, flip=False, jitter=0, resize=1, saturation=1, exposure=1, hue=0)


def one_object(index: int) -> Sample:
    box = (60, 40, 110, 80)
    return Sample(
        image=rectangle((120, 160), box),
        boxes=np.array([box], np.float32),
        labels=np.array([index]),
        is_crowd=np.zeros(1, bool),
        image_id=index,
        path=f"{index}.png",
    )


def no_object(index: int) -> Sample:
    return Sample(
        image=np.random.default_rng(index).integers(0, 256, (50, 70, 3), dtype=np.uint8),
        boxes=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int64),
        is_crowd=np.zeros(0, bool),
        image_id=index,
        path="",
    )


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("input_hw", [(128, 128), (96, 160)])
def test_boxes_follow_pixels_through_crop_and_flip(input_hw: tuple[int, int], letterbox: bool) -> None:
    options = AugmentOptions(mosaic=0, saturation=1, exposure=1, hue=0, fill=(0, 0, 0), letterbox=letterbox)
    augmenter = Augmenter(options, one_object, 1)
    kept = 0
    for seed in range(60):
        sample = augmenter(0, input_hw, np.random.default_rng(seed))
        assert sample.image.shape == (*input_hw, 3)
        if len(sample.boxes):
            kept += 1
            np.testing.assert_allclose(sample.boxes[0], extent(sample.image), atol=1.01)
        else:
            assert (sample.image[..., 0] > 127).sum() < 0.25 * 50 * 40 * 10
    assert kept > 40


def test_no_change_asked_for_no_change_made() -> None:
    source = no_object(3)
    sample = Augmenter(STILL, no_object, 1)(3, (50, 70), np.random.default_rng(0))
    np.testing.assert_array_equal(sample.image, source.image)


def test_letterbox_keeps_the_aspect_ratio() -> None:
    options = AugmentOptions(mosaic=0, flip=False, jitter=0, resize=1, saturation=1, exposure=1, hue=0, letterbox=True)
    sample = Augmenter(options, one_object, 1)(0, (160, 160), np.random.default_rng(0))
    np.testing.assert_allclose(sample.boxes, [[60, 60, 110, 100]], atol=1e-3)


def smooth(index: int) -> Sample:
    coarse = np.random.default_rng(index).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return replace(one_object(index), image=cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC))


class WholeImage(A.ImageOnlyTransform):
    """Changes nothing, and cannot be drawn for single pixels."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return img


@pytest.mark.parametrize("colour", [{}, {"saturation": 1, "exposure": 1, "hue": 0}])
@pytest.mark.parametrize("knobs", [{"mosaic": 0}, {"mosaic": 1}, {"mosaic": 1, "mosaic_geometry": "darknet"}])
def test_computing_only_the_visible_pixels_changes_nothing(
    knobs: dict[str, Any], colour: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same is drawn and seen as if each image were made whole, but for rounding."""
    options = AugmentOptions(**knobs, **colour)

    def augmenter(*transforms: Any) -> Augmenter:
        built = lambda options: [*photometric_transforms(options), *transforms]  # noqa: E731
        monkeypatch.setattr(data.augment, "photometric_transforms", built)
        return Augmenter(options, smooth, 5)

    lazy, whole = augmenter(), augmenter(WholeImage(p=1.0))
    for seed in range(12):
        one, other = (each(seed % 5, (64, 48), np.random.default_rng(seed)) for each in (lazy, whole))
        difference = np.abs(one.image.astype(int) - other.image)
        assert difference.max() <= 2
        assert difference.mean() < (0.01 if colour else 1)  # OpenCV rounds the last colours of a row otherwise
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert one.image.flags.writeable and one.image.std() > 10


def test_flip_mirrors_half_of_the_images() -> None:
    options = AugmentOptions(mosaic=0, jitter=0, resize=1, saturation=1, exposure=1, hue=0)
    augmenter = Augmenter(options, one_object, 1)
    lefts = [augmenter(0, (120, 160), np.random.default_rng(seed)).boxes[0, 0] for seed in range(300)]
    assert sorted({round(float(left), 3) for left in lefts}) == [50, 60]
    assert 0.4 < np.mean(np.array(lefts) < 55) < 0.6


def test_boxes_follow_pixels_to_a_fraction_of_one() -> None:
    sample = Augmenter(STILL, one_object, 1)(0, (360, 640), np.random.default_rng(0))
    weights = sample.image[..., 0] / sample.image[..., 0].sum()
    rows, columns = np.indices(weights.shape) + 0.5
    left, top, right, bottom = sample.boxes[0]
    assert (columns * weights).sum() == pytest.approx((left + right) / 2, abs=0.1)
    assert (rows * weights).sum() == pytest.approx((top + bottom) / 2, abs=0.1)


def test_crop_and_colour_are_drawn_independently() -> None:
    """Compose.set_random_seed gives each transform the same numbers: what this room must not use."""

    def coloured(index: int) -> Sample:
        sample = one_object(index)
        image = np.full_like(sample.image, (200, 150, 150))
        return replace(sample, image=image)

    options = AugmentOptions(mosaic=0, flip=False, jitter=0.1, resize=1, saturation=2, exposure=1, hue=0)
    margins, changes = [], []
    for seed in range(300):
        sample = Augmenter(options, coloured, 1)(0, (120, 160), np.random.default_rng(seed))
        left, _, right, _ = sample.boxes[0]
        margins.append(60 - left * 50 / (right - left))
        changes.append(abs(np.log((200 - sample.image[0, 0, 1]) / 50)))
    assert np.std(margins) > 5
    assert np.std(changes) > 0.1
    assert abs(np.corrcoef(margins, changes)[0, 1]) < 0.2


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_mosaics_are_made_as_often_as_asked(probability: float) -> None:
    loads: list[int] = []

    def load(index: int) -> Sample:
        loads.append(index)
        return one_object(index)

    augmenter = Augmenter(AugmentOptions(mosaic=probability), load, 50)
    counts = []
    for seed in range(200):
        before = len(loads)
        sample = augmenter(7, (64, 64), np.random.default_rng(seed))
        assert loads[before] == sample.image_id == 7
        counts.append(len(loads) - before)
    assert set(counts) <= {1, 4}
    assert np.mean(np.array(counts) == 4) == pytest.approx(probability, abs=0.1)


@pytest.mark.parametrize("options", [AugmentOptions(), AugmentOptions(mosaic=1, blur=0.5, noise=0.5, letterbox=True)])
def test_same_generator_same_sample(options: AugmentOptions) -> None:
    one, other = Augmenter(options, one_object, 20), Augmenter(options, one_object, 20)
    for seed in (3, 1, 2, 1):
        a = one(seed, (64, 96), np.random.default_rng(seed))
        other(0, (96, 64), np.random.default_rng(99))  # what came before leaves no trace
        b = other(seed, (64, 96), np.random.default_rng(seed))
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.boxes, b.boxes)


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_empty_images(mosaic: float) -> None:
    sample = Augmenter(AugmentOptions(mosaic=mosaic), no_object, 5)(0, (64, 64), np.random.default_rng(0))
    assert sample.boxes.shape == (0, 4)
    assert sample.labels.shape == sample.is_crowd.shape == (0,)


def test_the_fill_is_the_mean_colour_unless_given() -> None:
    def even(index: int) -> Sample:
        sample = no_object(index)
        return Sample(
            image=np.full_like(sample.image, (200, 100, 50)),
            boxes=sample.boxes,
            labels=sample.labels,
            is_crowd=sample.is_crowd,
            image_id=0,
            path="",
        )

    colours = {"mosaic": 0.0, "saturation": 1.0, "exposure": 1.0, "hue": 0.0}
    for seed in range(10):
        mean = Augmenter(AugmentOptions(**colours), even, 1)(0, (64, 64), np.random.default_rng(seed))
        assert (mean.image == (200, 100, 50)).all()
    black = AugmentOptions(**colours, fill=(0, 0, 0))
    samples = [Augmenter(black, even, 1)(0, (64, 64), np.random.default_rng(seed)) for seed in range(10)]
    assert any((sample.image == 0).all(axis=-1).any() for sample in samples)


@pytest.mark.parametrize(
    "knob", [{"mosaic": 1.1}, {"jitter": -0.1}, {"resize": 0.5}, {"exposure": 0}, {"hue": float("nan")}]
)
def test_impossible_knobs(knob: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(knob))):
        AugmentOptions(**knob)
