from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.augment
from data.albumentations_import import albumentations as A
from data.augment import Augmenter, ellipse_boxes
from data.augment_options import AugmentOptions
from data.crop import JitteredCrop
from data.photometric import photometric_transforms
from tests.utils.test_letterbox import extent, rectangle
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


def drawn_object(box: tuple[int, int, int, int], *, is_ellipse: bool, is_crowd: bool = False) -> Sample:
    """A box's object in white: all of the box, or the ellipse in it."""
    image = rectangle((120, 160), box)
    if is_ellipse:
        left, top, right, bottom = box
        rows, columns = np.indices((120, 160)) + 0.5
        away = ((columns - (left + right) / 2) / (right - left)) ** 2 + (
            (rows - (top + bottom) / 2) / (bottom - top)
        ) ** 2
        image[away > 0.25] = 0
    return replace(one_object(0), image=image, boxes=np.array([box], np.float32), is_crowd=np.array([is_crowd]))


BOXES = st.tuples(st.integers(0, 120), st.integers(0, 80), st.integers(12, 40), st.integers(12, 40)).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@settings(deadline=None, max_examples=60)
@given(
    box=BOXES,
    rotate=st.sampled_from([0.0, 10.0, 90.0, 180.0]),
    flip_ud=st.booleans(),
    letterbox=st.booleans(),
    is_crowd=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_box_goes_where_its_pixels_go(
    box: tuple[int, int, int, int], rotate: float, flip_ud: bool, letterbox: bool, is_crowd: bool, seed: int
) -> None:
    """Rotated, an object is the ellipse in its box; of a crowd region nothing is left out."""
    options = replace(PLAIN, rotate=rotate, flip_ud=flip_ud, letterbox=letterbox, resize=1.2)
    source = drawn_object(box, is_ellipse=rotate > 0 and not is_crowd, is_crowd=is_crowd)
    hw = (144, 176)
    sample = Augmenter(options, lambda _: source, 1)(0, hw, np.random.default_rng(seed))
    for moved in sample.boxes:
        if rotate == 0 or ((moved[:2] > 1).all() and (moved[2:] < np.array(hw[::-1]) - 1).all()):
            np.testing.assert_allclose(moved, extent(sample.image), atol=1.6)
    if not len(sample.boxes):
        assert (sample.image[..., 0] > 127).mean() < 0.02
    assert sample.is_crowd.tolist() == [is_crowd] * len(sample.boxes)


@pytest.mark.parametrize("geometry", ["content", "darknet"])
def test_boxes_follow_their_pixels_into_turned_mosaics(geometry: str) -> None:
    """All of an object's colour lies in the boxes with its label."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]], np.uint8)

    def coloured(index: int) -> Sample:
        source = drawn_object((50, 30, 110, 90), is_ellipse=True)
        image = np.where(source.image > 0, colours[index], 0).astype(np.uint8)
        return replace(source, image=image, labels=np.array([index]))

    knobs = {"mosaic": 1, "rotate": 180, "flip_ud": True, "mosaic_geometry": geometry, "min_visibility": 0}
    augmenter = Augmenter(replace(PLAIN, min_side_px=1, **knobs), coloured, 5)
    for seed in range(20):
        sample = augmenter(seed % 5, (128, 128), np.random.default_rng(seed))
        for label, colour in enumerate(colours):
            is_shown = (np.abs(sample.image.astype(int) - colour) < 60).all(axis=2)
            for left, top, right, bottom in sample.boxes[sample.labels == label]:
                is_shown[int(max(top - 2, 0)) : int(bottom + 3), int(max(left - 2, 0)) : int(right + 3)] = False
            assert is_shown.sum() <= 30  # a sliver has no box; an object has 2000 px


@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_an_image_upside_down_stays_in_its_corner_of_darknets_mosaic(corner: tuple[int, int]) -> None:
    crop = JitteredCrop(replace(PLAIN, flip_ud=True), (64, 80), corner)
    pipeline = A.Compose([crop], keypoint_params=A.KeypointParams("xy", remove_invisible=False))
    turned = 0
    for seed in range(20):
        pipeline.set_random_seed(seed)
        ends = pipeline(image=no_object(0).image, keypoints=np.array([[-0.5, -0.5], [69.5, 49.5]]))["keypoints"] + 0.5
        turned += ends[0, 1] > ends[1, 1]
        content = np.sort(ends, axis=0)
        np.testing.assert_allclose(content[corner, [0, 1]], np.array(corner) * (80, 64), atol=1e-3)
    assert 4 <= turned <= 16


def test_half_of_the_images_are_upside_down() -> None:
    shaded = replace(no_object(0), image=np.indices((100, 100))[0][..., None].repeat(3, axis=2).astype(np.uint8))
    augmenter = Augmenter(replace(STILL, flip_ud=True), lambda _: shaded, 1)
    firsts = [augmenter(0, (100, 100), np.random.default_rng(seed)).image[0, 0, 0] for seed in range(200)]
    assert set(firsts) == {0, 99} and 0.4 < np.mean(np.array(firsts) == 99) < 0.6


def test_the_ellipse_of_an_upright_box_has_that_box_and_a_circle_keeps_its_own() -> None:
    upright = np.array([[1, 2], [5, 2], [5, 9], [1, 9]], float)
    turned = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]], float) * np.sqrt(2)  # a square of 2x2 on its corner
    np.testing.assert_allclose(ellipse_boxes(np.stack([upright, turned])), [[1, 2, 5, 9], [-1, -1, 1, 1]], atol=1e-6)
    assert ellipse_boxes(np.zeros((0, 4, 2))).shape == (0, 4)


@pytest.mark.parametrize("knob", ["mixup", "cutmix"])
@pytest.mark.parametrize(("share", "mosaic"), [(0.5, 0), (1, 1)])
def test_images_are_mixed_as_often_as_asked(knob: str, share: float, mosaic: float) -> None:
    loads: list[int] = []

    def load(index: int) -> Sample:
        loads.append(index)
        return one_object(index)

    augmenter = Augmenter(AugmentOptions(mosaic=mosaic, **{knob: share}), load, 50)
    counts = []
    for seed in range(60):
        loads.clear()
        sample = augmenter(7, (64, 64), np.random.default_rng(seed))
        assert loads[0] == sample.image_id == 7
        counts.append(len(loads))
    assert set(counts) == ({8} if mosaic else {1, 2})
    assert np.mean(np.array(counts) > 1) == pytest.approx(share, abs=0.2)


@pytest.mark.parametrize("joined", [{"mosaic": 1}, {"mosaic": 0, "mixup": 1}, {"mosaic": 0, "cutmix": 1}])
def test_a_single_image_is_that_of_a_run_without_mosaic_and_mixing(joined: dict[str, float]) -> None:
    alone, other = (Augmenter(AugmentOptions(**knobs), one_object, 9) for knobs in ({"mosaic": 0}, joined))
    for seed in range(5):
        expected = alone(seed, (64, 64), np.random.default_rng(seed))
        single = other(seed, (64, 64), np.random.default_rng(seed), is_single=True)
        np.testing.assert_array_equal(single.image, expected.image)
        assert single.path == expected.path


def test_what_is_joined_is_drawn_by_its_share() -> None:
    loads: list[int] = []

    def load(index: int) -> Sample:
        loads.append(index)
        return one_object(index)

    augmenter = Augmenter(AugmentOptions(mosaic=1), load, 3, np.array([0.0, 0.2, 0.8]))
    for seed in range(100):
        augmenter(0, (32, 32), np.random.default_rng(seed))
    drawn = np.delete(np.array(loads), np.s_[::4])
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / len(drawn), [0, 0.2, 0.8], atol=0.08)
