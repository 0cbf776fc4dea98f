"""Darknet's mosaic, box by box and pixel by pixel, in its own quantities: margins and relative centre boxes.

After darknet, `data.c`, load_data_detection, fill_truth_detection and blend_truth_mosaic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An image (H, W, 3) with xyxy boxes and labels, and what was drawn for it; margins in its pixels."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    pleft: int
    pright: int
    ptop: int
    pbot: int
    flip: bool
    pushed: bool


def darknet_mosaic(
    images: Sequence[Drawn], *, cut_xy: tuple[int, int], hw: tuple[int, int], bound: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> image (*hw, 3), boxes (M, 4) xyxy in its pixels, labels (M,).

    A pixel is the nearest of its image, where darknet interpolates: the same where nothing is zoomed.
    """
    h, w = hw
    cut_x, cut_y = cut_xy
    out = np.zeros((h, w, 3), np.uint8)
    rows, labels = [], []
    for k, drawn in enumerate(images):
        pleft, pright, ptop, pbot = _pushed(drawn, k)
        truths = _cropped(drawn, pleft, pright, ptop, pbot, hw)
        image = _crop(drawn, pleft, pright, ptop, pbot, hw)
        if drawn.flip:
            pleft, pright = pright, pleft
        oh, ow = drawn.image.shape[:2]
        left_shift = min(cut_x, max(0, int(-pleft * w / ow)))
        top_shift = min(cut_y, max(0, int(-ptop * h / oh)))
        right_shift = min(w - cut_x, max(0, int(-pright * w / ow)))
        bot_shift = min(h - cut_y, max(0, int(-pbot * h / oh)))
        # Column of the mosaic + dx = column of the augmented image; rows alike.
        dx = w - cut_x - right_shift if k in (0, 2) else left_shift - cut_x
        dy = h - cut_y - bot_shift if k in (0, 1) else top_shift - cut_y
        left, right = (0, cut_x) if k in (0, 2) else (cut_x, w)
        top, bottom = (0, cut_y) if k in (0, 1) else (cut_y, h)
        for y in range(top, bottom):
            for x in range(left, right):
                out[y, x] = image[y + dy, x + dx]
        for (bx, by, bw, bh), label in truths:
            box = (bx - dx / w, by - dy / h, bw, bh)
            box = _in_tile(box, (left, top, right, bottom), hw) if bound else _in_image(box)
            if _is_kept(box, hw):
                rows.append(box)
                labels.append(label)
    return out, _xyxy(rows, hw), np.array(labels, np.int64)


def _pushed(drawn: Drawn, k: int) -> tuple[int, int, int, int]:
    """Margins moved so that the content lies in the corner that will be seen; flip swaps left and right."""
    pleft, pright, ptop, pbot = drawn.pleft, drawn.pright, drawn.ptop, drawn.pbot
    if drawn.pushed:
        if (k in (0, 2)) != drawn.flip:
            pright, pleft = pright + pleft, 0
        else:
            pleft, pright = pleft + pright, 0
        if k in (0, 1):
            pbot, ptop = pbot + ptop, 0
        else:
            ptop, pbot = ptop + pbot, 0
    return pleft, pright, ptop, pbot


def _crop(drawn: Drawn, pleft: int, pright: int, ptop: int, pbot: int, hw: tuple[int, int]) -> np.ndarray:
    oh, ow = drawn.image.shape[:2]
    swidth, sheight = ow - pleft - pright, oh - ptop - pbot
    mean_colour = np.round(drawn.image.mean(axis=(0, 1)))
    out = np.zeros((*hw, 3), np.uint8)
    for y in range(hw[0]):
        for x in range(hw[1]):
            source_x, source_y = pleft + x * swidth // hw[1], ptop + y * sheight // hw[0]
            inside = 0 <= source_x < ow and 0 <= source_y < oh
            out[y, x] = drawn.image[source_y, source_x] if inside else mean_colour
    return out[:, ::-1] if drawn.flip else out


def _cropped(
    drawn: Drawn, pleft: int, pright: int, ptop: int, pbot: int, hw: tuple[int, int]
) -> list[tuple[tuple[float, float, float, float], int]]:
    """Relative centre boxes of the crop, cut to it; those with a side below one input pixel are dropped."""
    oh, ow = drawn.image.shape[:2]
    swidth, sheight = ow - pleft - pright, oh - ptop - pbot
    truths = []
    for (x1, y1, x2, y2), label in zip(drawn.boxes.tolist(), drawn.labels.tolist(), strict=True):
        left, right = ((x - pleft) / swidth for x in (x1, x2))
        top, bottom = ((y - ptop) / sheight for y in (y1, y2))
        if drawn.flip:
            left, right = 1 - right, 1 - left
        left, right, top, bottom = (min(max(edge, 0), 1) for edge in (left, right, top, bottom))
        box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        if box[2] >= 1 / hw[1] and box[3] >= 1 / hw[0]:
            truths.append((box, label))
    return truths


def _in_tile(
    box: tuple[float, ...], tile: tuple[int, int, int, int], hw: tuple[int, int]
) -> tuple[float, float, float, float]:
    """mosaic_bound=1: edges become whole pixels, and are cut to the tile's."""
    (x, y, w, h), (height, width) = box, hw
    left, right = max(_whole((x - w / 2) * width), tile[0]), min(_whole((x + w / 2) * width), tile[2])
    top, bottom = max(_whole((y - h / 2) * height), tile[1]), min(_whole((y + h / 2) * height), tile[3])
    return (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height


def _whole(edge_px: float) -> int:
    """C's conversion to int, but for rounding: a whole number stays one, where in darknet chance decides."""
    return int(round(edge_px, 6))


def _in_image(box: tuple[float, ...]) -> tuple[float, float, float, float]:
    """mosaic_bound=0: cut to the whole mosaic."""
    x, y, w, h = box
    left, right, top, bottom = max(x - w / 2, 0), min(x + w / 2, 1), max(y - h / 2, 0), min(y + h / 2, 1)
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _is_kept(box: tuple[float, ...], hw: tuple[int, int]) -> bool:
    x, y, w, h = box
    return 0 < w < 1 and 0 < h < 1 and 0 < x < 1 and 0 < y < 1 and w > 1 / hw[1] and h > 1 / hw[0]


def _xyxy(rows: list[tuple[float, float, float, float]], hw: tuple[int, int]) -> np.ndarray:
    table = np.array(rows, np.float64).reshape(-1, 4)
    edges = np.concatenate([table[:, :2] - table[:, 2:] / 2, table[:, :2] + table[:, 2:] / 2], axis=1)
    return edges * (hw[1], hw[0], hw[1], hw[0])
