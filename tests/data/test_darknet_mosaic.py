"""Mosaics in darknet's geometry: from whole images to Samples, against the oracle in tests/reference."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from data import augment
from data.augment import Augmenter
from data.augment_options import AugmentOptions
from data.crop import JitteredCrop
from data.mosaic import darknet_mosaic
from tests.data.test_mosaic import noise_sample
from tests.reference import darknet_mosaic as oracle
from utils.errors import UserError
from utils.structures import Sample

HW = (48, 64)
DARKNET: dict[str, Any] = {"mosaic_geometry": "darknet", "min_visibility": 0.0, "min_side_px": 1.0}
BOUND, UNBOUND = (AugmentOptions(mosaic_bound=bound, **DARKNET) for bound in (True, False))
GREY = {"saturation": 1.0, "exposure": 1.0, "hue": 0.0}


def image(index: int) -> Sample:
    """Noise of a size of its own, with boxes anywhere: on the edges, tiny, as large as the image."""
    rng = np.random.default_rng(index)
    height, width = rng.integers((40, 50), (90, 110))
    corners = np.sort(rng.uniform(0, (width, height), size=(14, 2, 2)), axis=1).reshape(-1, 4)
    corners[:3, 2:] = corners[:3, :2] + rng.uniform(0.3, 3, size=(3, 2))
    corners[3] = (0, 0, width, height)
    return Sample(
        image=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        boxes=corners.clip(0, (width, height, width, height)).astype(np.float32),
        labels=np.arange(14) + 100 * index,
        is_crowd=np.zeros(14, bool),
        image_id=index,
        path=f"{index}.png",
    )


class Recorder:
    """Makes one mosaic of an Augmenter and notes what was drawn for it.

    Margins are drawn here, in whole pixels as in darknet; `zoom` or not; `flip` all images or none.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, *, zoom: bool, flip: bool, bound: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.zoom = zoom
        self.loaded: list[Sample] = []
        self.margins: list[tuple[int, int, int, int]] = []
        self.corners: list[tuple[int, int] | None] = []
        mirror, cut = augment.A.HorizontalFlip, augment.draw_cut
        monkeypatch.setattr(augment.A, "HorizontalFlip", lambda p: mirror(p=float(flip)))
        monkeypatch.setattr(augment, "draw_cut", lambda rng, hw: self.note_cut(cut(rng, hw)))
        monkeypatch.setattr(JitteredCrop, "_margins", lambda crop, hw: self.draw_margins(hw))
        augmenter = Augmenter(AugmentOptions(mosaic=1, mosaic_bound=bound, **GREY, **DARKNET), self.load, 1000)
        pipeline = augmenter._pipeline
        monkeypatch.setattr(augmenter, "_pipeline", lambda hw, corner: pipeline(hw, self.note_corner(corner)))
        self.result = augmenter(seed, HW, np.random.default_rng(seed))

    def load(self, index: int) -> Sample:
        self.loaded.append(image(index))
        return self.loaded[-1]

    def note_cut(self, cut_xy: tuple[int, int]) -> tuple[int, int]:
        self.cut_xy = cut_xy
        return cut_xy

    def note_corner(self, corner: tuple[int, int] | None) -> tuple[int, int] | None:
        self.corners.append(corner)
        return corner

    def draw_margins(self, image_hw: tuple[int, int]) -> np.ndarray:
        """Left, right, top and bottom; not zoomed means that the crop has the size of the input."""
        near = self.rng.integers(-25, 25, size=2)
        far = self.rng.integers(-25, 25, size=2) if self.zoom else np.array(image_hw) - HW - near
        self.margins.append((near[1], far[1], near[0], far[0]))
        return np.array(self.margins[-1], np.float64)

    def drawn(self, *, flip: bool) -> list[oracle.Drawn]:
        """For the oracle. Mirroring before the crop, as we do with a pushed one, swaps the margins drawn."""
        images = []
        for sample, (left, right, top, bottom), corner in zip(self.loaded, self.margins, self.corners, strict=True):
            if flip and corner is not None:
                left, right = right, left
            images.append(
                oracle.Drawn(
                    image=sample.image,
                    boxes=sample.boxes,
                    labels=sample.labels,
                    pleft=int(left),
                    pright=int(right),
                    ptop=int(top),
                    pbot=int(bottom),
                    flip=flip,
                    pushed=corner is not None,
                )
            )
        return images


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("zoom", [False, True])
def test_same_draws_same_boxes_and_pixels(monkeypatch: pytest.MonkeyPatch, zoom: bool, flip: bool, bound: bool) -> None:
    kept, pushed = 0, Counter[bool]()
    for seed in range(12):
        ours = Recorder(monkeypatch, seed, zoom=zoom, flip=flip, bound=bound)
        image, boxes, labels = oracle.darknet_mosaic(ours.drawn(flip=flip), cut_xy=ours.cut_xy, hw=HW, bound=bound)
        np.testing.assert_array_equal(ours.result.labels, labels)
        np.testing.assert_allclose(ours.result.boxes, boxes, atol=1e-3)
        if not zoom:
            np.testing.assert_array_equal(ours.result.image, image)
        kept += len(labels)
        pushed.update(corner is not None for corner in ours.corners)
        monkeypatch.undo()
    assert kept > 100
    assert min(pushed.values()) >= 8


def test_the_oracle_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the draws matters: with another one the oracle makes another mosaic."""
    ours = Recorder(monkeypatch, 5, zoom=True, flip=False, bound=True)
    drawn = ours.drawn(flip=False)
    _, boxes, _ = oracle.darknet_mosaic(drawn, cut_xy=ours.cut_xy, hw=HW, bound=True)
    others = {
        "cut": oracle.darknet_mosaic(drawn, cut_xy=(ours.cut_xy[0] + 3, ours.cut_xy[1]), hw=HW, bound=True),
        "bound": oracle.darknet_mosaic(drawn, cut_xy=ours.cut_xy, hw=HW, bound=False),
        "flip": oracle.darknet_mosaic(ours.drawn(flip=True), cut_xy=ours.cut_xy, hw=HW, bound=True),
    }
    for name, (_, other, _) in others.items():
        assert other.shape != boxes.shape or not np.allclose(other, boxes, atol=0.5), name


def test_half_of_the_tiles_are_pushed_each_into_its_corner(monkeypatch: pytest.MonkeyPatch) -> None:
    augmenter = Augmenter(AugmentOptions(mosaic=1, **GREY, **DARKNET), image, 50)
    corners: list[tuple[int, int] | None] = []
    pipeline = augmenter._pipeline
    monkeypatch.setattr(augmenter, "_pipeline", lambda hw, corner: corners.append(corner) or pipeline(hw, corner))
    for seed in range(150):
        augmenter(0, HW, np.random.default_rng(seed))
    for tile, corner in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        drawn = corners[tile::4]
        assert set(drawn) == {None, corner}
        assert 0.4 < sum(each is not None for each in drawn) / 150 < 0.6


def test_a_box_runs_on_into_the_next_tile_unless_bound() -> None:
    """Darknet measures the empty margin of a shrunken image too wide, moves the window too far, and the box stays."""
    empty = noise_sample(0, hw=HW, objects=0)
    box = np.array([[20.0, 10.0, 40.0, 24.0]], np.float32)
    first = Sample(image=empty.image, boxes=box, labels=np.array([7]), is_crowd=np.zeros(1, bool), image_id=1, path="p")
    contents = np.array([[0, 0, 40, 24]] + [[0, 0, 64, 48]] * 3)  # of the first, the left and upper part
    knobs = {"cut_xy": (30, 24), "contents": contents}
    leaking = darknet_mosaic([first, empty, empty, empty], UNBOUND, **knobs)
    bound = darknet_mosaic([first, empty, empty, empty], BOUND, **knobs)
    np.testing.assert_array_equal(leaking.boxes, [[20, 10, 40, 24]])  # the tile ends at 30
    np.testing.assert_array_equal(bound.boxes, [[20, 10, 30, 24]])


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((40, 30, 41, 40), False),  # one pixel wide
        ((40, 30, 42, 40), True),
        ((40, 30, 42, 31), False),
        ((-50, 30, 80, 40), False),  # as wide as the mosaic
        ((-50, 30, 63, 40), True),
    ],
)
def test_sides_that_darknet_keeps(box: tuple[float, ...], kept: bool) -> None:
    empty = noise_sample(0, hw=HW, objects=0)
    for is_crowd in (False, True):
        last = Sample(
            image=empty.image,
            boxes=np.array([box], np.float32) - (32, 24, 32, 24),
            labels=np.array([1]),
            is_crowd=np.array([is_crowd]),
            image_id=1,
            path="",
        )
        result = darknet_mosaic(
            [empty, empty, empty, last], UNBOUND, cut_xy=(32, 24), contents=np.array([[0, 0, 64, 48]] * 4)
        )
        assert len(result.labels) == (kept or is_crowd)  # of a crowd, which darknet does not know, all stays


@pytest.mark.parametrize("geometry", [{}, DARKNET])
def test_max_boxes_keeps_so_many_drawn_at_random(geometry: dict[str, Any]) -> None:
    every = Augmenter(AugmentOptions(**geometry), image, 10**6)
    few = Augmenter(AugmentOptions(max_boxes=5, **geometry), image, 10**6)
    kept, seen = set[int](), set[int]()
    for seed in range(60):
        all_of_them = every(3, HW, np.random.default_rng(seed))
        some = few(3, HW, np.random.default_rng(seed))
        assert len(some.labels) == min(5, len(all_of_them.labels))
        assert set(some.labels) <= set(all_of_them.labels)
        rows = [all_of_them.labels.tolist().index(label) for label in some.labels.tolist()]
        np.testing.assert_array_equal(some.boxes, all_of_them.boxes[rows])
        np.testing.assert_array_equal(some.image, all_of_them.image)
        kept.update(label % 100 for label in some.labels.tolist())
        seen.update(label % 100 for label in all_of_them.labels.tolist())
    assert kept == seen  # whatever its place among the objects, each may be drawn


@pytest.mark.parametrize("bound", [True, False])
def test_mosaic_and_letterbox_go_together(bound: bool) -> None:
    """Darknet refuses to train with both; 14 of its own cfgs ask for them."""
    options = AugmentOptions(mosaic=1, letterbox=True, mosaic_bound=bound, **DARKNET)
    kept = 0
    for seed in range(40):
        sample = Augmenter(options, image, 20)(seed, HW, np.random.default_rng(seed))
        assert sample.image.shape == (*HW, 3)
        assert (sample.boxes >= 0).all() and (sample.boxes <= (64, 48, 64, 48)).all()
        kept += len(sample.labels)
    assert kept > 200


def test_empty_images() -> None:
    empty = [noise_sample(k, hw=HW, objects=0) for k in range(4)]
    result = darknet_mosaic(empty, BOUND, cut_xy=(30, 20), contents=np.array([[0, 0, 64, 48]] * 4))
    assert result.boxes.shape == (0, 4) and result.boxes.dtype == np.float32


def test_boxes_beyond_their_tile_need_darknets_geometry() -> None:
    with pytest.raises(UserError, match="--no-mosaic-bound, need --mosaic-geometry darknet"):
        AugmentOptions(mosaic_bound=False)
    assert AugmentOptions(mosaic_bound=False, mosaic_geometry="darknet").mosaic_bound is False
