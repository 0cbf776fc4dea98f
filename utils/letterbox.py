"""Laying a whole image into the network input: stretched, or letterboxed between grey bars."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from utils.structures import Placement

GREY = (127, 127, 127)  # darknet fills letterboxes with 0.5
RESIZES = ("opencv", "darknet")  # how evaluation and detection resize an image to the network input


def whole_placement(source_hw: tuple[int, int], input_hw: tuple[int, int], *, letterbox: bool) -> Placement:
    """Return the placement that fills the input, or with `letterbox` the one in its middle that keeps the aspect ratio.

    The aspect ratio is kept up to rounding to whole pixels. Source: darknet, `image.c`, letterbox_image.
    """
    (height, width), (input_h, input_w) = source_hw, input_hw
    inner_h, inner_w = input_hw
    if letterbox and input_w * height < input_h * width:
        inner_h = max(1, height * input_w // width)
    elif letterbox:
        inner_w = max(1, width * input_h // height)
    return Placement(
        source_hw=source_hw,
        scale_x=inner_w / width,
        scale_y=inner_h / height,
        left_px=float((input_w - inner_w) // 2),
        top_px=float((input_h - inner_h) // 2),
    )


def as_input(
    image: np.ndarray,
    hw: tuple[int, int],
    *,
    letterbox: bool,
    how: str = "opencv",
    source_hw: tuple[int, int] | None = None,
) -> tuple[np.ndarray, Placement]:
    """Lay a whole image (H, W, 3) uint8 into a network input (*hw, 3): uint8, or darknet's float32 in 0..1.

    letterbox: with grey bars at two sides, else stretched. how: one of RESIZES. source_hw: the size that boxes refer
    to, and that the image is shown as, by default its own.
    """
    placement = whole_placement(source_hw or image.shape[:2], hw, letterbox=letterbox)
    inner_w, inner_h = (round(side) for side in placement.image_px)
    top, left = int(placement.top_px), int(placement.left_px)
    resized = (darknet_resize if how == "darknet" else resize)(image, (inner_h, inner_w))
    canvas = np.full((*hw, 3), 0.5 if how == "darknet" else GREY, resized.dtype)
    canvas[top : top + inner_h, left : left + inner_w] = resized
    if how == "darknet":
        # Darknet pastes at whole pixels, but maps boxes back from half ones (`yolo_layer.c`, correct_yolo_boxes).
        placement = replace(placement, left_px=(hw[1] - inner_w) / 2, top_px=(hw[0] - inner_h) / 2)
    return canvas, placement


def resize(image: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Resize by area averaging if the image shrinks, so that thin objects do not alias; else bilinearly."""
    if image.shape[:2] == tuple(hw):
        return image
    shrinks = hw[0] < image.shape[0] or hw[1] < image.shape[1]
    return cv2.resize(image, hw[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def darknet_resize(image: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (*hw, 3) float32 in 0..1: bilinear with aligned corners, without averaging on shrinking.

    Source: darknet, `image.c`, resize_image: first the columns, then the rows, in single precision. The last row never
    gets its lower neighbour's share, so that it is black if rounding puts it just above the image's last row (50 rows
    to 96, for example); detections depend on that.
    """
    pixels = image.astype(np.float32) / np.float32(255)
    left, share = _align_corners(pixels.shape[1], hw[1])
    left[-1], share[-1] = pixels.shape[1] - 1, 0
    right = np.minimum(left + 1, pixels.shape[1] - 1)
    pixels = (1 - share)[:, None] * pixels[:, left] + share[:, None] * pixels[:, right]
    above, share = _align_corners(pixels.shape[0], hw[0])
    below = np.minimum(above + 1, pixels.shape[0] - 1)
    rows = (1 - share)[:, None, None] * pixels[above]
    rows[:-1] += share[:-1, None, None] * pixels[below[:-1]]
    return rows


def _align_corners(source: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of `size` pixels the source pixel at or before it, and the share of the next one, float32."""
    position = np.arange(size, dtype=np.float32) * (np.float32(source - 1) / np.float32(max(size - 1, 1)))
    before = position.astype(np.intp)
    return before, position - before.astype(np.float32)
