from pathlib import Path

import numpy as np
import pytest

from tests.reference import resize as oracle
from utils.letterbox import RESIZES, as_input, darknet_resize

SIZES = [
    ((48, 64), (96, 96)),
    ((64, 48), (96, 96)),
    ((31, 77), (64, 128)),
    ((96, 96), (96, 96)),
    ((500, 3), (32, 32)),
]


def rectangle(hw: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((*hw, 3), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    return image


def extent(image: np.ndarray) -> np.ndarray:
    """xyxy of the bright pixels."""
    bright = image[..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize(("source_hw", "input_hw"), SIZES)
@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("how", RESIZES)
def test_to_input_and_back_is_the_identity(
    how: str, letterbox: bool, source_hw: tuple[int, int], input_hw: tuple[int, int]
) -> None:
    laid, placement = as_input(np.zeros((*source_hw, 3), np.uint8), input_hw, letterbox=letterbox, how=how)
    assert laid.shape == (*input_hw, 3)
    assert laid.dtype == (np.float32 if how == "darknet" else np.uint8)
    assert placement.source_hw == source_hw
    height, width = source_hw
    boxes = np.array([[0, 0, width, height], [1, 2, width / 2, height / 3]], np.float32)
    inside = placement.to_input(boxes)
    assert (inside >= 0).all()
    assert (inside <= np.array(input_hw[::-1] * 2) + 1e-4).all()
    np.testing.assert_allclose(placement.to_source(inside), boxes, atol=1e-3)


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("input_hw", [(96, 96), (64, 128), (40, 32)])
def test_boxes_follow_pixels(input_hw: tuple[int, int], how: str, letterbox: bool) -> None:
    box = (10, 8, 50, 40)
    laid, placement = as_input(rectangle((48, 64), box), input_hw, letterbox=letterbox, how=how)
    if how == "darknet":  # corner pixels lie on each other there, so that others move by up to half a pixel
        laid = np.where(laid == 0.5, 0, laid * 255)
    np.testing.assert_allclose(placement.to_input(np.array([box], np.float32))[0], extent(laid), atol=1.5)


@pytest.mark.parametrize(("how", "white", "grey"), [("opencv", 255, 127), ("darknet", 1, 0.5)])
def test_letterbox_keeps_the_aspect_ratio_and_fills_the_bars(how: str, white: float, grey: float) -> None:
    laid, placement = as_input(np.full((50, 100, 3), 255, np.uint8), (128, 128), letterbox=True, how=how)
    assert (placement.scale_x, placement.scale_y) == (1.28, 1.28)
    assert (placement.left_px, placement.top_px) == (0, 32)
    assert (laid[:32] == grey).all()
    assert (laid[96:] == grey).all()
    assert (laid[32:96] == white).all()


@pytest.mark.parametrize("letterbox", [False, True])
def test_the_image_within_the_input(letterbox: bool) -> None:
    _, placement = as_input(np.zeros((30, 50, 3), np.uint8), (96, 96), letterbox=letterbox)
    assert placement.image_px == pytest.approx((96, 57) if letterbox else (96, 96))
    assert placement.pixel_px == pytest.approx((96 / 50, (57 if letterbox else 96) / 30))


def test_a_letterbox_is_of_whole_pixels_whatever_the_size() -> None:
    """Rounded down, as integers divide: 3 * (100 / 300) is a little more than 1 in floating point, or less."""
    for height in range(1, 120):
        _, placement = as_input(np.zeros((height, 60, 3), np.uint8), (96, 64), letterbox=True)
        width_px, height_px = placement.image_px
        expected = (64, max(1, height * 64 // 60)) if 64 * height < 96 * 60 else (60 * 96 // height, 96)
        assert (width_px, height_px) == pytest.approx(expected)
        assert placement.left_px == (64 - expected[0]) // 2
        assert placement.top_px == (96 - expected[1]) // 2


# --- as darknet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hw", [(7, 9), (2, 2), (40, 50), (23, 61)])
@pytest.mark.parametrize("source_hw", [(13, 17), (2, 30), (50, 3), (1, 1), (23, 61)])
def test_darknets_resize_pixel_by_pixel(source_hw: tuple[int, int], hw: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*source_hw, 3), dtype=np.uint8)
    made, expected = darknet_resize(image, hw), oracle.darknet_resize(image.astype(np.float32) / np.float32(255), hw)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_the_last_row_may_come_out_black() -> None:
    """50 rows to 96: 95 * (49 / 95) is less than 49 in single precision. darknet's detections show it, too."""
    white = np.full((50, 64, 3), 255, np.uint8)
    made = darknet_resize(white, (96, 128))
    np.testing.assert_allclose(made[:-1], 1, atol=1e-6)
    assert (made[-1] < 1e-4).all()
    np.testing.assert_allclose(made, oracle.darknet_resize(white.astype(np.float32) / 255, (96, 128)), atol=1e-6)
    np.testing.assert_allclose(darknet_resize(white.transpose(1, 0, 2), (128, 96)), 1, atol=1e-6)  # not a column


def test_an_image_of_the_inputs_size_stays() -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(darknet_resize(image, (24, 32)), image.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("hw", [(1, 4), (4, 1), (1, 1)])
def test_an_input_one_pixel_high_or_wide(hw: tuple[int, int]) -> None:
    made = darknet_resize(np.full((5, 7, 3), 255, np.uint8), hw)
    assert made.shape == (*hw, 3)
    assert np.isfinite(made).all()


def test_darknet_brings_boxes_back_from_half_pixels() -> None:
    """31 of 40 columns are the image's: they begin at column 4, but count from 4.5."""
    laid, placement = as_input(np.full((40, 31, 3), 255, np.uint8), (40, 40), letterbox=True, how="darknet")
    assert (laid[:, 4:35] == 1).all()
    assert (laid[:, :4] == 0.5).all()
    assert (placement.left_px, placement.top_px) == (4.5, 0)


def check_against_darknet(images: np.lib.npyio.NpzFile, tag: str, kind: str) -> None:
    image, expected = (images[f"{tag}/{name}"].transpose(1, 2, 0) for name in ("u8_chw", kind))
    made, _ = as_input(image, expected.shape[:2], letterbox=kind == "letterbox", how="darknet")
    np.testing.assert_allclose(made, expected, atol=1e-6)


@pytest.mark.parametrize(("tag", "kind"), [("down", "resize"), ("tall", "letterbox")])
def test_images_are_as_darknet_made_them(root: Path, tag: str, kind: str) -> None:
    check_against_darknet(np.load(root / "tests" / "golden" / "darknet_resize.npz"), tag, kind)


@pytest.mark.parametrize("kind", ["resize", "letterbox"])
@pytest.mark.parametrize("tag", ["down", "up", "tall", "wide", "same"])
def test_all_images_are_as_darknet_made_them(shared: Path, tag: str, kind: str) -> None:
    check_against_darknet(np.load(shared / "darknet" / "fixtures" / "preprocess.npz"), tag, kind)


# --- boxes -------------------------------------------------------------------------------------------------------
