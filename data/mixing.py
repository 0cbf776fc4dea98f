"""Mixing two training images of one size, by blending them (mixup) or by pasting a window of one (CutMix)."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from data.augment_options import AugmentOptions
from data.geometry import clip_boxes, visible
from utils.structures import Sample


def mixup(sample: Sample, other: Sample) -> Sample:
    """Blend two Samples half and half; the result has the objects of both.

    Source: darknet, `data.c`, load_data_detection (`mixup=1`).
    """
    return _with_objects(replace(sample, image=cv2.addWeighted(sample.image, 0.5, other.image, 0.5, 0)), other)


def draw_window(rng: np.random.Generator, hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Draw a window, xyxy in whole pixels: its area is uniform, its centre too, and what reaches outside is cut off.

    Source: Yun et al. 2019, CutMix (arXiv:1905.04899), equation 2, with Beta(1, 1).
    """
    side = np.sqrt(rng.random()) * np.array(hw[::-1])
    centre = rng.random(2) * np.array(hw[::-1])
    left, top = np.maximum(np.round(centre - side / 2), 0).astype(int).tolist()
    right, bottom = np.minimum(np.round(centre + side / 2), hw[::-1]).astype(int).tolist()
    return left, top, right, bottom


def cutmix(sample: Sample, other: Sample, options: AugmentOptions, *, window: tuple[int, int, int, int]) -> Sample:
    """Paste a window (xyxy) of `other` into the same place of `sample`.

    Boxes of `other` are cut to the window, those of `sample` to the rest, where that is a rectangle; objects of either
    are dropped if less than options.min_visibility of their boxes is left to see.
    """
    left, top, right, bottom = window
    image = sample.image.copy()
    image[top:bottom, left:right] = other.image[top:bottom, left:right]
    cut = clip_boxes(other.boxes, window)
    pasted = replace(other, boxes=cut).where(visible(other.boxes, cut, other.is_crowd, options))
    return _with_objects(_uncovered(replace(sample, image=image), window, options), pasted)


def _uncovered(sample: Sample, window: tuple[int, int, int, int], options: AugmentOptions) -> Sample:
    """Shrink boxes to what is visible of them beside the window, and drop objects of which too little is."""
    whole = sample.boxes
    hidden = clip_boxes(whole, window)
    rest = whole.copy()
    for axis in (0, 1):
        start, stop, across, across_stop = axis, axis + 2, 1 - axis, 3 - axis
        spans = (hidden[:, across] == whole[:, across]) & (hidden[:, across_stop] == whole[:, across_stop])
        from_start = spans & (hidden[:, start] == whole[:, start])
        to_stop = spans & (hidden[:, stop] == whole[:, stop])
        rest[from_start, start] = hidden[from_start, stop]
        rest[to_stop, stop] = hidden[to_stop, start]
    area, hidden_area = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (whole, hidden))
    is_enough = (area - hidden_area >= options.min_visibility * area) | sample.is_crowd
    return replace(sample, boxes=rest).where(is_enough & visible(rest, rest, sample.is_crowd, options))


def _with_objects(sample: Sample, other: Sample) -> Sample:
    return replace(
        sample,
        boxes=np.concatenate([sample.boxes, other.boxes]),
        labels=np.concatenate([sample.labels, other.labels]),
        is_crowd=np.concatenate([sample.is_crowd, other.is_crowd]),
        path=f"{sample.path} + {other.path}",
    )
