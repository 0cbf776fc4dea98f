"""Laying a whole picture into the network input, and the one rule for which boxes survive a cut."""

from __future__ import annotations

import cv2
import numpy as np

from utils.structures import Placement

GREY = (127, 127, 127)  # darknet fills letterboxes with 0.5


def stretch_placement(source_hw: tuple[int, int], input_hw: tuple[int, int]) -> Placement:
    """The picture fills the input; its aspect ratio changes."""
    return Placement(
        source_hw=source_hw,
        scale_x=input_hw[1] / source_hw[1],
        scale_y=input_hw[0] / source_hw[0],
        left_px=0.0,
        top_px=0.0,
    )


def letterbox_placement(source_hw: tuple[int, int], input_hw: tuple[int, int]) -> Placement:
    """The whole picture in the middle of the input, in its own aspect ratio but for rounding to whole pixels.

    Source: darknet, `image.c`, letterbox_image.
    """
    scale = min(input_hw[0] / source_hw[0], input_hw[1] / source_hw[1])
    inner_h, inner_w = (
        min(full, max(1, int(side * scale + 1e-6))) for side, full in zip(source_hw, input_hw, strict=True)
    )
    return Placement(
        source_hw=source_hw,
        scale_x=inner_w / source_hw[1],
        scale_y=inner_h / source_hw[0],
        left_px=float((input_hw[1] - inner_w) // 2),
        top_px=float((input_hw[0] - inner_h) // 2),
    )


def stretch(image: np.ndarray, hw: tuple[int, int]) -> tuple[np.ndarray, Placement]:
    """image: (H, W, 3) uint8 -> (*hw, 3) uint8."""
    return resize(image, hw), stretch_placement(image.shape[:2], hw)


def letterbox(
    image: np.ndarray, hw: tuple[int, int], fill: tuple[int, int, int] = GREY
) -> tuple[np.ndarray, Placement]:
    """image: (H, W, 3) uint8 -> (*hw, 3) uint8, with bars of `fill` (RGB) at two sides."""
    placement = letterbox_placement(image.shape[:2], hw)
    inner_h = round(image.shape[0] * placement.scale_y)
    inner_w = round(image.shape[1] * placement.scale_x)
    top, left = int(placement.top_px), int(placement.left_px)
    canvas = np.full((*hw, 3), fill, np.uint8)
    canvas[top : top + inner_h, left : left + inner_w] = resize(image, (inner_h, inner_w))
    return canvas, placement


def resize(image: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Area-averaging when the picture shrinks, so that thin things do not flicker; else bilinear."""
    if image.shape[:2] == tuple(hw):
        return image
    shrinks = hw[0] < image.shape[0] or hw[1] < image.shape[1]
    return cv2.resize(image, hw[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def clip_boxes(boxes: np.ndarray, bounds: tuple[float, float, float, float]) -> np.ndarray:
    """(M, 4) xyxy boxes cut to the rectangle `bounds` (xyxy); one wholly outside comes back without area."""
    left, top, right, bottom = bounds
    return boxes.clip(
        np.array([left, top, left, top], boxes.dtype), np.array([right, bottom, right, bottom], boxes.dtype)
    )


def visible(
    whole: np.ndarray,
    cut: np.ndarray,
    is_crowd: np.ndarray,
    *,
    min_visibility: float,
    min_side_px: float,
) -> np.ndarray:
    """(M,) bool: which objects are still worth learning after their boxes `whole` were cut to `cut`.

    An object needs both sides >= min_side_px and a share of its area >= min_visibility left. Of a crowd
    region every pixel counts, for whatever is left of it must still not be taken for background.
    """
    sides = cut[:, 2:] - cut[:, :2]
    whole_sides = whole[:, 2:] - whole[:, :2]
    share = sides.prod(axis=1) / np.maximum(whole_sides.prod(axis=1), 1e-9)
    seen = (sides >= min_side_px).all(axis=1) & (share >= min_visibility)
    return np.where(is_crowd, (sides > 0).all(axis=1), seen)
