import numpy as np
import pytest

from data.geometry import clip_boxes, letterbox, stretch, visible

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
@pytest.mark.parametrize("lay", [stretch, letterbox])
def test_to_input_and_back_is_the_identity(lay, source_hw, input_hw) -> None:  # type: ignore[no-untyped-def]
    laid, placement = lay(np.zeros((*source_hw, 3), np.uint8), input_hw)
    assert laid.shape == (*input_hw, 3)
    assert placement.source_hw == source_hw
    height, width = source_hw
    boxes = np.array([[0, 0, width, height], [1, 2, width / 2, height / 3]], np.float32)
    inside = placement.to_input(boxes)
    assert (inside >= 0).all()
    assert (inside <= np.array(input_hw[::-1] * 2) + 1e-4).all()
    np.testing.assert_allclose(placement.to_source(inside), boxes, atol=1e-3)


@pytest.mark.parametrize("lay", [stretch, letterbox])
@pytest.mark.parametrize("input_hw", [(96, 96), (64, 128), (40, 32)])
def test_boxes_follow_pixels(lay, input_hw) -> None:  # type: ignore[no-untyped-def]
    box = (10, 8, 50, 40)
    laid, placement = lay(rectangle((48, 64), box), input_hw)
    np.testing.assert_allclose(placement.to_input(np.array([box], np.float32))[0], extent(laid), atol=1)


def test_letterbox_keeps_the_aspect_ratio_and_fills_the_bars() -> None:
    laid, placement = letterbox(np.full((50, 100, 3), 255, np.uint8), (128, 128), fill=(1, 2, 3))
    assert (placement.scale_x, placement.scale_y) == (1.28, 1.28)
    assert (placement.left_px, placement.top_px) == (0, 32)
    assert (laid[:32] == (1, 2, 3)).all()
    assert (laid[96:] == (1, 2, 3)).all()
    assert (laid[32:96] == 255).all()


def test_clipping() -> None:
    boxes = np.array([[-5, -5, 5, 5], [50, 50, 60, 60]], np.float32)
    assert clip_boxes(boxes, (0, 0, 20, 20)).tolist() == [[0, 0, 5, 5], [20, 20, 20, 20]]


def test_visibility_is_a_share_of_the_whole_object_but_crowds_always_count() -> None:
    whole = np.array([[-90, 0, 10, 10], [-5, 0, 5, 10], [0, 0, 1.5, 10], [-90, 0, 10, 10], [-9, 0, -1, 10]], np.float32)
    cut = clip_boxes(whole, (0, 0, 20, 20))
    crowd = np.array([False, False, False, True, True])
    seen = visible(whole, cut, crowd, min_visibility=0.2, min_side_px=2)
    assert seen.tolist() == [False, True, False, True, False]
    assert visible(whole[:0], cut[:0], crowd[:0], min_visibility=0.2, min_side_px=2).tolist() == []
