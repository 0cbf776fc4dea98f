"""Which boxes survive a cut."""

from __future__ import annotations

import numpy as np

from data.augment_options import AugmentOptions


def clip_boxes(boxes: np.ndarray, bounds: tuple[float, float, float, float]) -> np.ndarray:
    """Clip (M, 4) xyxy boxes to the rectangle `bounds` (xyxy); a box wholly outside is left without area."""
    left, top, right, bottom = bounds
    return boxes.clip(
        np.array([left, top, left, top], boxes.dtype), np.array([right, bottom, right, bottom], boxes.dtype)
    )


def visible(whole: np.ndarray, cut: np.ndarray, is_crowd: np.ndarray, options: AugmentOptions) -> np.ndarray:
    """Return (M,) bool: the objects still worth learning after their boxes `whole` were cut to `cut`.

    An object needs some area, and the options' min_side_px and min_visibility. A crowd region needs only some area,
    since what is left of it is still not background.
    """
    sides = cut[:, 2:] - cut[:, :2]
    whole_sides = whole[:, 2:] - whole[:, :2]
    share = sides.prod(axis=1) / np.maximum(whole_sides.prod(axis=1), 1e-9)
    is_visible = (sides >= options.min_side_px).all(axis=1) & (share >= options.min_visibility)
    return (sides > 0).all(axis=1) & (is_visible | is_crowd)
