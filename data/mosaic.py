"""Mosaic augmentation: four images in one, so that a small batch shows many objects and contexts.

Source: Bochkovskiy et al., YOLOv4 (arXiv:2004.10934), section 3.3, and darknet, `data.c`: each tile is a
window cut out of an image of full input size, not a shrunken image. `mosaic` is ours; `darknet_mosaic` has darknet's
windows and boxes. Tiles are in the order top left, top right, bottom left, bottom right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.augment_options import AugmentOptions
from data.geometry import clip_boxes, visible
from utils.structures import Sample


def draw_cut(rng: np.random.Generator, hw: tuple[int, int]) -> tuple[int, int]:
    """Draw where the four tiles meet, (x, y) in pixels: in the middle 60 % of both sides, as in darknet."""
    height, width = hw
    return (
        int(rng.integers(int(0.2 * width), int(0.8 * width) + 1)),
        int(rng.integers(int(0.2 * height), int(0.8 * height) + 1)),
    )


def mosaic(
    samples: Sequence[Sample], options: AugmentOptions, *, cut_xy: tuple[int, int], contents: np.ndarray
) -> Sample:
    """Join four Samples of one size into one of that size.

    contents: (4, 4) xyxy, where the image is within each sample (the rest is fill); a tile's window moves so that it
    shows content where it can. Boxes may reach beyond their sample, so that options.min_visibility is a share of the
    whole object. They are cut to their tile.
    """
    tiles = _tiles(contents, cut_xy, samples[0].image.shape[:2])
    boxes, kept = [], []
    for sample, tile in zip(samples, tiles, strict=True):
        whole = sample.boxes + tile.shift
        cut = clip_boxes(whole, tile.bounds)
        boxes.append(cut)
        kept.append(visible(whole, cut, sample.is_crowd, options))
    return _joined(samples, tiles, boxes, kept)


def darknet_mosaic(
    samples: Sequence[Sample], options: AugmentOptions, *, cut_xy: tuple[int, int], contents: np.ndarray
) -> Sample:
    """Join four Samples as darknet does. Boxes must be cut to their samples before, as darknet's loader does.

    With options.mosaic_bound boxes have whole pixels and are cut to their tile; without it, they are cut only to the
    whole mosaic, and may reach into the neighbouring tile, over pixels of another image. Either way a box is kept if
    its sides are longer than options.min_side_px and shorter than the mosaic's.
    """
    height, width = hw = samples[0].image.shape[:2]
    tiles = _tiles(_contents_of_darknet(contents, hw), cut_xy, hw)
    boxes, kept = [], []
    for sample, tile in zip(samples, tiles, strict=True):
        whole = sample.boxes + tile.shift
        cut = clip_boxes(np.trunc(whole), tile.bounds)
        if not options.mosaic_bound:
            cut = clip_boxes(whole, (0, 0, width, height))
        sides = cut[:, 2:] - cut[:, :2]
        fits = ((sides > options.min_side_px) & (sides < (width, height))).all(axis=1)
        boxes.append(cut)
        kept.append(visible(whole, cut, sample.is_crowd, options) & (fits | sample.is_crowd))
    return _joined(samples, tiles, boxes, kept)


class _Tile(NamedTuple):
    """A tile of the mosaic. bounds: xyxy. source_xy: the sample's pixel at its top-left corner."""

    bounds: tuple[int, int, int, int]
    source_xy: tuple[int, int]

    @property
    def shift(self) -> np.ndarray:
        """The offset (4,) from xyxy in the sample to xyxy in the mosaic."""
        left, top = self.bounds[:2]
        return np.array([left - self.source_xy[0], top - self.source_xy[1]] * 2, np.float32)


def _tiles(contents: np.ndarray, cut_xy: tuple[int, int], hw: tuple[int, int]) -> list[_Tile]:
    tiles = []
    for tile, content in enumerate(contents):
        row, column = divmod(tile, 2)
        left, right, source_x = _window(column, cut_xy[0], hw[1], content[0], content[2])
        top, bottom, source_y = _window(row, cut_xy[1], hw[0], content[1], content[3])
        tiles.append(_Tile(bounds=(left, top, right, bottom), source_xy=(source_x, source_y)))
    return tiles


def _window(side: int, cut: int, full: int, content_start: float, content_stop: float) -> tuple[int, int, int]:
    """Return, for one axis, the tile's start and stop in the mosaic, and its window's start in the sample.

    The tile before the cut ends where its content ends; the tile after it starts where its content starts.
    """
    start, stop = (0, cut) if side == 0 else (cut, full)
    length = stop - start
    source = content_stop - length if side == 0 else content_start
    return start, stop, int(min(max(source, 0), full - length))


def _contents_of_darknet(contents: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Return the contents (4, 4) as darknet computes them, in whole pixels.

    It scales the margins of the crop to input pixels by the ratio of input and image, not of input and crop (left_shift
    etc.), as if there were no zoom.
    """
    full = np.array(hw[::-1], np.float64)
    start, stop = contents[:, :2].astype(np.float64), contents[:, 2:].astype(np.float64)
    zoom = (stop - start) / full
    # Darknet truncates; a whole margin may be slightly below itself in the float32 contents.
    before, after = (np.trunc(margin / zoom + 1e-3) for margin in (start, full - stop))
    return np.concatenate([before, full - after], axis=1)


def _joined(
    samples: Sequence[Sample], tiles: Sequence[_Tile], boxes: Sequence[np.ndarray], kept: Sequence[np.ndarray]
) -> Sample:
    """Paste the tiles. boxes, kept: for each sample (M, 4) in the mosaic and (M,) bool."""
    canvas = np.empty(samples[0].image.shape, samples[0].image.dtype)
    for sample, ((left, top, right, bottom), (x, y)) in zip(samples, tiles, strict=True):
        canvas[top:bottom, left:right] = sample.image[y : y + bottom - top, x : x + right - left]
    keep = np.concatenate(kept)
    return Sample(
        image=canvas,
        boxes=np.concatenate(boxes)[keep],
        labels=np.concatenate([sample.labels for sample in samples])[keep],
        is_crowd=np.concatenate([sample.is_crowd for sample in samples])[keep],
        image_id=samples[0].image_id,
        path=" + ".join(dict.fromkeys(sample.path for sample in samples)),
    )
