"""Large images in tiles: every pixel is in one, and every object is found once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tiling import TilingOptions, detect_tiled, merge, overlap_px, tiles_of
from utils.structures import Detections

COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
LEAST_PX = 4  # of an object in the network's input


def squares(input_px: int, noise_px: float = 0.0):
    """A detector of rectangles of pure colours: it sees images in `input_px` pixels, and nothing smaller than LEAST_PX.

    noise_px: its boxes are off by up to so many input pixels.
    """
    rng = np.random.default_rng(0)

    def detect(images: Sequence[np.ndarray]) -> list[Detections]:
        return [one(image) for image in images]

    def one(image: np.ndarray) -> Detections:
        shrink = max(1.0, max(image.shape[:2]) / input_px)
        boxes, labels = [], []
        for label, colour in enumerate(COLOURS):
            mask = cv2.inRange(image, colour, colour)
            for left, top, width, height, _ in cv2.connectedComponentsWithStats(mask)[2][1:]:
                if min(width, height) >= LEAST_PX * shrink:
                    boxes.append((left, top, left + width, top + height))
                    labels.append(label)
        exact = np.array(boxes, np.float32).reshape(-1, 4)
        noisy = exact + rng.uniform(-noise_px, noise_px, exact.shape).astype(np.float32) * shrink
        clipped = noisy.clip(0, np.array([*image.shape[1::-1]] * 2, np.float32))
        scores = torch.from_numpy(rng.uniform(0.5, 1, len(boxes)).astype(np.float32))
        found = Detections(boxes=torch.from_numpy(clipped), scores=scores, labels=torch.tensor(labels).long())
        return found.where(scores.argsort(descending=True))

    return detect


def scene(hw: tuple[int, int], sizes: Sequence[tuple[int, int]], seed: int = 0):
    """An image with rectangles (width, height) that do not touch; returns it, their boxes (M, 4) and labels."""
    rng = np.random.default_rng(seed)
    image, taken = np.zeros((*hw, 3), np.uint8), np.zeros(hw, bool)
    boxes, labels = [], []
    for width, height in sizes:
        for _ in range(200):
            left, top = rng.integers(0, hw[1] - width + 1), rng.integers(0, hw[0] - height + 1)
            around = np.s_[max(0, top - 3) : top + height + 3, max(0, left - 3) : left + width + 3]
            if not taken[around].any():
                break
        else:
            raise AssertionError("no place")
        label = rng.integers(len(COLOURS))
        image[top : top + height, left : left + width] = COLOURS[label]
        taken[around] = True
        boxes.append((left, top, left + width, top + height))
        labels.append(label)
    return image, np.array(boxes).reshape(-1, 4), np.array(labels)


def as_set(boxes, labels) -> list[tuple[int, ...]]:
    return sorted((*map(int, box), int(label)) for box, label in zip(boxes, labels, strict=True))


@settings(deadline=None)
@given(long=st.integers(1, 2000), short=st.integers(1, 100), tile=st.integers(32, 800), overlap=st.floats(0, 0.9))
def test_the_tiles_cover_the_image_and_overlap_enough(long, short, tile, overlap):
    options = TilingOptions(tile=tile, tile_overlap=overlap)
    tiles, shared = tiles_of((short, long), options).tolist(), overlap_px(options)
    assert {(right - left, bottom - top) for left, top, right, bottom in tiles} == {(min(tile, long), min(tile, short))}
    columns, rows = (sorted({(each[axis], each[axis + 2]) for each in tiles}) for axis in (0, 1))
    assert len(tiles) == len(set(map(tuple, tiles))) == len(columns) * len(rows)
    for spans, length in ((columns, long), (rows, short)):
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(last - first >= shared for (_, last), (first, _) in pairwise(spans))
        assert len(spans) == 1 or len(spans) - 1 < (length - shared) / (tile - shared)  # no more than needed


def test_small_objects_in_4000_pixels_are_counted_exactly():
    image, boxes, labels = scene((1200, 4000), [(600, 900), (1500, 700)] + [(20, 20)] * 200)
    detect = squares(input_px=640)
    (alone,) = detect([image])
    assert len(alone) == 2  # a pass over the whole image sees the large ones only
    found = detect_tiled(detect, image, TilingOptions(tile=640), 0.45)
    assert as_set(found.boxes, found.labels) == as_set(boxes, labels)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(90, 400), width=st.integers(90, 400), data=st.data())
def test_objects_of_every_size_are_found_once(seed, height, width, data):
    """Also those larger than the overlap, than a tile, and in its corners."""
    side = st.integers(8, 80)
    sizes = data.draw(st.lists(st.tuples(side, side), max_size=5))
    try:
        image, boxes, labels = scene((height, width), sizes, seed)
    except AssertionError:
        return
    options = TilingOptions(tile=64, tile_overlap=data.draw(st.sampled_from([0.2, 0.3, 0.5])))
    found = detect_tiled(squares(input_px=64), image, options, 0.45)
    assert as_set(found.boxes, found.labels) == as_set(boxes, labels)


@pytest.mark.parametrize("seed", range(3))
def test_inexact_boxes_are_still_counted_exactly(seed):
    image, _, labels = scene((1500, 2000), [(300, 500)] * 2 + [(100, 140)] * 8 + [(20, 20)] * 60, seed)
    found = detect_tiled(squares(input_px=320, noise_px=1), image, TilingOptions(tile=320), 0.45)
    assert sorted(found.labels.tolist()) == sorted(labels.tolist())


def test_an_object_that_only_pieces_were_found_of_is_whole():
    """In the whole image it is too thin to be seen; it crosses three tiles."""
    image, boxes, labels = scene((100, 1000), [(500, 8)], seed=3)
    detect = squares(input_px=200)
    assert len(detect([image])[0]) == 0
    found = detect_tiled(detect, image, TilingOptions(tile=200), 0.45)
    assert as_set(found.boxes, found.labels) == as_set(boxes, labels)


IMAGE, LEFT, RIGHT = (0, 0, 180, 100), (0, 0, 100, 100), (80, 0, 180, 100)  # two tiles that overlap by 20 px


@pytest.mark.parametrize(
    ("whole", "seen_in", "piece"),
    [
        ((88, 20, 130, 80), RIGHT, (88, 20, 100, 80)),  # as long as the overlap allows: dropped
        ((70, 20, 175, 80), IMAGE, (70, 20, 100, 80)),  # longer: a piece of the whole
    ],
)
@settings(deadline=None)
@given(
    short_px=st.floats(0, 5),
    noise=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    scores=st.permutations((0.9, 0.5)),
)
def test_a_piece_whose_box_ends_short_of_its_tiles_edge_is_no_second_object(
    whole, seen_in, piece, short_px, noise, scores
):
    boxes = torch.tensor([whole, piece], dtype=torch.float32)
    boxes[1] += torch.tensor([*noise[:2], -short_px, noise[2]])
    window = torch.tensor([seen_in, LEFT], dtype=torch.float32)
    found = Detections(boxes=boxes, scores=torch.tensor(scores), labels=torch.zeros(2, dtype=torch.long))
    assert merge(found, window, IMAGE[:1:-1], 20, 0.45).boxes.tolist() == [list(whole)]
    others = Detections(boxes=boxes, scores=found.scores, labels=torch.tensor([0, 1]))
    if short_px > 1:  # of another class, it ends there
        assert len(merge(others, window, IMAGE[:1:-1], 20, 0.45)) == 2


def test_neighbours_near_an_edge_that_do_not_agree_stay_two():
    """A small one in front of the left tile's edge, and below it a large one that goes on beyond."""
    boxes = torch.tensor([[86.0, 5, 97, 20], [86, 25, 130, 90]])
    window = torch.tensor([LEFT, RIGHT], dtype=torch.float32)
    found = Detections(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.zeros(2, dtype=torch.long))
    assert merge(found, window, IMAGE[:1:-1], 20, 0.45).boxes.tolist() == boxes.tolist()


def test_neighbours_of_two_classes_stay_two():
    image = np.zeros((100, 300, 3), np.uint8)
    image[40:60, 100:120], image[40:60, 120:140] = COLOURS[0], COLOURS[1]
    found = detect_tiled(squares(input_px=100), image, TilingOptions(tile=100, tile_overlap=0.5), 0.45)
    assert as_set(found.boxes, found.labels) == [(100, 40, 120, 60, 0), (120, 40, 140, 60, 1)]


@pytest.mark.parametrize("hw", [(64, 64), (1, 1), (30, 64)])
def test_an_image_within_a_tile_is_detected_once(hw):
    calls = []

    def detect(images):
        calls.extend(image.shape[:2] for image in images)
        return squares(64)(images)

    detect_tiled(detect, np.zeros((*hw, 3), np.uint8), TilingOptions(tile=64), 0.45)
    assert calls == [hw]


def test_an_empty_scene_has_nothing():
    found = detect_tiled(squares(64), np.zeros((200, 300, 3), np.uint8), TilingOptions(tile=64), 0.45)
    assert len(found) == 0 and found.boxes.shape == (0, 4)
