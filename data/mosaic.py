"""Four pictures in one: the augmentation that lets a small batch see many objects and contexts.

Source: Bochkovskiy et al., YOLOv4 (arXiv:2004.10934), section 3.3, and darknet, `data.c`: each tile is a
window cut out of a picture of full input size, not a shrunken picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.geometry import clip_boxes, visible
from utils.structures import Sample


def draw_cut(rng: np.random.Generator, hw: tuple[int, int]) -> tuple[int, int]:
    """Where the four tiles meet, (x, y) in pixels: in the middle 60 % of both sides, as in darknet."""
    height, width = hw
    return (
        int(rng.integers(int(0.2 * width), int(0.8 * width) + 1)),
        int(rng.integers(int(0.2 * height), int(0.8 * height) + 1)),
    )


def mosaic(
    samples: Sequence[Sample],
    *,
    cut_xy: tuple[int, int],
    contents: np.ndarray | None = None,
    min_visibility: float,
    min_side_px: float,
) -> Sample:
    """Four Samples of one size -> one of that size; tiles are top left, top right, bottom left, bottom right.

    contents: (4, 4) xyxy, where each picture really is within its sample (the rest is fill); a tile's
    window is moved so that it shows content where it can. Boxes may reach beyond their sample, so that
    `min_visibility` counts against the whole object. They are cut to their tile: darknet does so with
    `mosaic_bound=1`; its default lets a box run on into the neighbouring tile, over pixels not its own.
    """
    height, width = samples[0].image.shape[:2]
    cut_x, cut_y = cut_xy
    if contents is None:
        contents = np.array([[0, 0, width, height]] * 4)
    canvas = np.empty_like(samples[0].image)
    boxes, kept = [], []
    for tile, (sample, content) in enumerate(zip(samples, contents, strict=True)):
        row, column = divmod(tile, 2)
        left, right, source_x = _window(column, cut_x, width, content[0], content[2])
        top, bottom, source_y = _window(row, cut_y, height, content[1], content[3])
        canvas[top:bottom, left:right] = sample.image[
            source_y : source_y + bottom - top, source_x : source_x + right - left
        ]
        shift = np.array([left - source_x, top - source_y] * 2, np.float32)
        whole = sample.boxes + shift
        cut = clip_boxes(whole, (left, top, right, bottom))
        boxes.append(cut)
        kept.append(visible(whole, cut, sample.is_crowd, min_visibility=min_visibility, min_side_px=min_side_px))
    keep = np.concatenate(kept)
    return Sample(
        image=canvas,
        boxes=np.concatenate(boxes)[keep],
        labels=np.concatenate([sample.labels for sample in samples])[keep],
        is_crowd=np.concatenate([sample.is_crowd for sample in samples])[keep],
        image_id=samples[0].image_id,
        path=samples[0].path,
    )


def _window(side: int, cut: int, full: int, content_start: float, content_stop: float) -> tuple[int, int, int]:
    """Of one axis: the tile's start and stop in the mosaic, and where its window starts in the sample.

    The tile before the cut ends where its content ends; the tile after it starts where its content starts.
    """
    start, stop = (0, cut) if side == 0 else (cut, full)
    length = stop - start
    wanted = content_stop - length if side == 0 else content_start
    return start, stop, int(min(max(wanted, 0), full - length))
