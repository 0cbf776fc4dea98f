"""A warped image of which only the windows that are used get computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Warped:
    """A (*hw, 3) uint8 array that is not computed yet; `warped[rows, columns]` computes that window of it.

    A mosaic shows about a quarter of each of its images; warping and recolouring the rest would take most of the
    time. matrix: (2, 3), source pixel -> input pixel, both by their centres. fill: RGB around the source. mirrored:
    flip left and right after the warp. recolour: applied in this order; each must act on single pixels.
    """

    source: np.ndarray
    matrix: np.ndarray
    hw: tuple[int, int]
    fill: tuple[float, ...]
    mirrored: bool = False
    recolour: Sequence[Callable[[np.ndarray], np.ndarray]] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.hw, 3)

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        return self.source.dtype

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (each.indices(side) for each, side in zip(window, self.hw, strict=True))
        size = (right - left, bottom - top)
        if min(size) <= 0:
            return np.empty((max(size[1], 0), max(size[0], 0), 3), self.dtype)
        if self.mirrored:
            left = self.hw[1] - right
        matrix = self.matrix - np.array([[0, 0, left], [0, 0, top]])
        image = cv2.warpAffine(self.source, matrix, size, flags=cv2.INTER_LINEAR, borderValue=self.fill)
        if self.mirrored:
            image = cv2.flip(image, 1)
        for change in self.recolour:
            image = change(image)
        return image
