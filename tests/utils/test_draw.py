"""Drawn images keep their size, leave their source alone, and show what they should where they should."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.draw import class_colour, contact_sheet, draw_boxes, write_png

NAMES = ["cell", "a class of a remarkably long name", "y"]


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def test_colours_are_stable_and_far_apart() -> None:
    colours = np.array([class_colour(label) for label in range(12)], float)
    assert class_colour(3) == class_colour(3)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 1e3 * np.eye(12)
    assert distances.min() > 50
    assert len({class_colour(label) for label in range(80)}) == 80


def test_the_source_stays_and_the_outline_has_its_class_colour() -> None:
    image = grey(100, 100)
    drawn = draw_boxes(image, np.array([[20.2, 40, 60, 80]]), [2], NAMES)
    assert (image == 128).all() and drawn.shape == image.shape and drawn.dtype == np.uint8
    assert tuple(drawn[80, 40]) == tuple(drawn[60, 60]) == class_colour(2)
    assert (drawn[50:75, 25:55] == 128).all()


@pytest.mark.parametrize("size", [(1, 1), (128, 128), (480, 640), (3000, 4000), (40, 300)])
@pytest.mark.parametrize("box", [[0, 0, 1, 1], [-50, -50, 9000, 9000], [0.9, 0.9, 0.95, 0.95]])
def test_any_size_and_any_box(size: tuple[int, int], box: list[float]) -> None:
    height, width = size
    boxes = np.array([box]) * [width, height, width, height]
    drawn = draw_boxes(grey(height, width), boxes, np.array([1]), NAMES, np.array([0.5]))
    assert drawn.shape == (height, width, 3)
    assert (drawn != 128).any()


@pytest.mark.parametrize("corner", [(0, 0), (300, 0), (0, 230), (300, 230)])
def test_captions_stay_inside_the_image(corner: tuple[int, int]) -> None:
    # The letters are what is neither plate nor background: nothing of them may be cut off.
    def letters(image: np.ndarray) -> int:
        return int(((image != class_colour(0)).any(axis=2) & (image != 128).any(axis=2)).sum())

    left, top = corner
    box = np.array([[left, top, left + 19, top + 9]])
    centred = draw_boxes(grey(240, 320), np.array([[100, 100, 119, 109]]), [0], NAMES, [0.5])
    assert letters(draw_boxes(grey(240, 320), box, [0], NAMES, [0.5])) == letters(centred) > 30


def test_captions_do_not_cover_each_other() -> None:
    box = np.array([[40.0, 60, 90, 90]])
    one = draw_boxes(grey(128, 128), box, [0], NAMES, [0.9])
    two = draw_boxes(grey(128, 128), np.repeat(box, 2, 0), [0, 2], NAMES, [0.9, 0.8])
    plate = np.s_[40:59, 40:90]
    np.testing.assert_array_equal(one[plate], two[plate])
    assert (two == class_colour(2)).all(axis=2).any(), "the second caption found another place"


def test_no_boxes_give_an_equal_copy() -> None:
    image = grey(10, 10)
    drawn = draw_boxes(image, np.empty((0, 4)), [], NAMES, [])
    assert drawn is not image
    np.testing.assert_array_equal(drawn, image)


def test_a_view_with_reversed_channels_can_be_drawn_on() -> None:
    assert draw_boxes(grey(50, 50)[..., ::-1], np.array([[5, 5, 20, 20]]), [0], NAMES).shape == (50, 50, 3)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_contact_sheet_holds_every_image_whole(count: int) -> None:
    images = np.stack([np.full((10, 30, 3), 10 * (i + 1), np.uint8) for i in range(count)])
    sheet = contact_sheet(images)
    assert sheet.shape == (-(-count // 4) * (10 + 4) + 4, min(count, 4) * (30 + 4) + 4, 3)
    for number, image in enumerate(images):
        top, left = 4 + number // 4 * 14, 4 + number % 4 * 34
        assert (sheet[top : top + 10, left : left + 30] == image).all()
    assert (sheet == 255).all(axis=2).sum() == sheet[..., 0].size - count * 300


def test_png_is_written_as_rgb(tmp_path: Path) -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[..., 0] = 200
    path = tmp_path / "a folder" / "image é.png"
    write_png(path, image)
    read = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(read[..., ::-1], image)
