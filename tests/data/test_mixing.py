"""Oracle of cutmix: count, pixel by pixel, what is left to see of each object."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augment_options import AugmentOptions
from data.mixing import cutmix, draw_window, mixup
from tests.utils.test_letterbox import extent
from utils.structures import Sample

HW = (12, 16)
OPTIONS = AugmentOptions(min_visibility=0.25, min_side_px=2)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """A rectangle of at least a pixel, on whole pixels."""
    left, right = sorted(draw(st.lists(st.integers(0, HW[1]), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(draw(st.lists(st.integers(0, HW[0]), min_size=2, max_size=2, unique=True)))
    return left, top, right, bottom


def painted(box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((*HW, 3), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    return image


def sample(*objects: tuple[int, int, int, int], crowd: bool = False, colour: int = 0, label: int = 0) -> Sample:
    return Sample(
        image=np.full((*HW, 3), colour, np.uint8),
        boxes=np.array(objects, np.float32).reshape(-1, 4),
        labels=np.arange(len(objects)) + label,
        is_crowd=np.full(len(objects), crowd),
        image_id=label,
        path=f"{label}.png",
    )


@settings(deadline=None, max_examples=300)
@given(box=boxes(), window=boxes(), is_pasted=st.booleans(), is_crowd=st.booleans())
def test_boxes_of_a_cutmix_are_those_of_the_pixels_left(
    box: tuple[int, int, int, int], window: tuple[int, int, int, int], is_pasted: bool, is_crowd: bool
) -> None:
    shown = sample(box, crowd=is_crowd, label=7)
    pair = (sample(), shown) if is_pasted else (shown, sample())
    result = cutmix(*pair, OPTIONS, window=window)
    whole, inside = painted(box), painted(window) > 0
    left = np.where(inside == is_pasted, whole, 0)
    is_kept = bool(left.any())
    if is_kept and not is_crowd:
        left_box = extent(left)
        is_kept = bool(left.sum() >= 0.25 * whole.sum() and (left_box[2:] - left_box[:2] >= 2).all())
    assert result.boxes.tolist() == ([extent(left).tolist()] if is_kept else [])
    assert result.labels.tolist() == [7] * is_kept
    assert result.is_crowd.tolist() == [is_crowd] * is_kept


def test_a_cutmix_shows_the_window_of_the_other_image() -> None:
    result = cutmix(sample(colour=10), sample(colour=200, label=1), OPTIONS, window=(3, 2, 9, 8))
    np.testing.assert_array_equal(result.image, np.where(painted((3, 2, 9, 8)) > 0, 200, 10))
    assert (result.image_id, result.path) == (0, "0.png + 1.png")


def test_a_mixup_is_half_of_each_with_the_objects_of_both() -> None:
    one, other = sample((0, 0, 4, 4), (1, 1, 9, 9), colour=10), sample((2, 3, 8, 8), colour=200, label=5, crowd=True)
    result = mixup(one, other)
    assert (result.image == 105).all() and result.image.dtype == np.uint8
    np.testing.assert_array_equal(result.boxes, np.concatenate([one.boxes, other.boxes]))
    assert (result.labels.tolist(), result.is_crowd.tolist()) == ([0, 1, 5], [False, False, True])
    assert (one.image == 10).all()


@pytest.mark.parametrize("mix", [mixup, lambda *pair: cutmix(*pair, OPTIONS, window=(0, 0, 5, 5))])
def test_images_without_objects_mix(mix) -> None:
    result = mix(sample(), sample(colour=9))
    assert result.boxes.shape == (0, 4) and result.boxes.dtype == np.float32
    assert result.labels.shape == result.is_crowd.shape == (0,)


def test_windows_lie_within_the_image_and_cover_a_good_part_of_it() -> None:
    rng = np.random.default_rng(0)
    windows = np.array([draw_window(rng, (100, 200)) for _ in range(3000)])
    assert windows.min() == 0 and (windows.max(axis=0)[2:] == (200, 100)).all()
    shares = (windows[:, 2:] - windows[:, :2]).prod(axis=1) / (100 * 200)
    assert (shares >= 0).all() and shares.max() > 0.85
    assert shares.mean() == pytest.approx(0.31, abs=0.03)  # half of the image, less what reaches outside
