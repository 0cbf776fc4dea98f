"""darknet's resize, one pixel at a time, in single precision."""

from __future__ import annotations

import numpy as np

F = np.float32


def darknet_resize(pixels: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32 -> (*hw, 3) float32; both sizes of hw above 1."""
    height, width = hw
    source_h, source_w, _ = pixels.shape
    part = np.zeros((source_h, width, 3), F)
    for row in range(source_h):
        for column in range(width):
            if column == width - 1:
                part[row, column] = pixels[row, source_w - 1]
            else:
                place = F(column) * (F(source_w - 1) / F(width - 1))
                left = int(place)
                share = place - F(left)
                part[row, column] = (F(1) - share) * pixels[row, left]
                if share:
                    part[row, column] += share * pixels[row, left + 1]
    made = np.zeros((height, width, 3), F)
    for row in range(height):
        place = F(row) * (F(source_h - 1) / F(height - 1))
        above = int(place)
        share = place - F(above)
        made[row] = (F(1) - share) * part[above]
        if share and row < height - 1:
            made[row] += share * part[above + 1]
    return made
