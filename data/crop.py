"""Darknet's geometric jitter: a random crop rectangle of the image, warped onto the network input.

Source: darknet, `data.c`, load_data_detection (`jitter`, `resize`, `letter_box`). Where the rectangle reaches outside
the image, the input shows the fill colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from data.albumentations_import import albumentations as A
from data.augment_options import AugmentOptions
from utils.letterbox import whole_placement


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


class JitteredCrop(A.Affine):  # type: ignore[misc]
    """Image of any size -> network input of `input_hw`, in one warp, kept as `warped`; the image returned is blank.

    With options.rotate the image turns around its centre under the crop; with options.flip_ud half of the crops are
    upside down.

    With options.letterbox the crop is drawn around the letterboxed rectangle instead of the image. corner: (column,
    row), each 0 or 1, of the image's corner that the crop is pushed into, in the size drawn; None leaves it in place.
    """

    warped: Warped  # of the last image

    def __init__(self, options: AugmentOptions, input_hw: tuple[int, int], corner: tuple[int, int] | None) -> None:
        super().__init__(fill=options.fill or (0, 0, 0), p=1.0)
        self.input_hw = input_hw
        self.options = options
        self.corner = corner
        self._blank = np.zeros((*input_hw, 3), np.uint8)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        image_hw = params["shape"][:2]
        is_upside_down = self.options.flip_ud and self.random_generator.random() < 0.5
        left, top, width, height = self._rectangle(image_hw, is_upside_down)
        scale_x, scale_y = self.input_hw[1] / width, self.input_hw[0] / height
        edges = np.array([[scale_x, 0, -left * scale_x], [0, scale_y, -top * scale_y], [0, 0, 1]])
        if is_upside_down:
            edges = np.array([[1, 0, 0], [0, -1, self.input_hw[0]], [0, 0, 1]]) @ edges
        if self.options.rotate:
            edges = edges @ self._rotation(image_hw)
        # OpenCV warps pixel centres, which lie half a pixel inside the edges that boxes are made of.
        to_edges = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        centres = np.linalg.inv(to_edges) @ edges @ to_edges
        return {
            "matrix": centres,
            "bbox_matrix": edges,
            "output_shape": self.input_hw,
            "scale": {"x": scale_x, "y": scale_y},
        }

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        fill = cv2.mean(img)[:3] if self.options.fill is None else self.fill
        self.warped = Warped(source=img, matrix=params["matrix"][:2], hw=self.input_hw, fill=fill)
        return self._blank

    def _rotation(self, image_hw: tuple[int, int]) -> np.ndarray:
        """Draw (3, 3) a rotation around the image's centre."""
        degrees = self.random_generator.uniform(-self.options.rotate, self.options.rotate)
        matrix = cv2.getRotationMatrix2D((image_hw[1] / 2, image_hw[0] / 2), degrees, 1.0)
        return np.concatenate([matrix, [[0.0, 0.0, 1.0]]])

    def _rectangle(self, image_hw: tuple[int, int], is_upside_down: bool) -> tuple[float, float, float, float]:
        """Draw left, top, width and height of the crop, in pixels of the image."""
        height, width = image_hw
        left, right, top, bottom = self._margins(image_hw)
        crop_w, crop_h = max(width - left - right, 1.0), max(height - top - bottom, 1.0)
        if self.corner is not None:
            column, row = self.corner
            left, top = column * (width - crop_w), (row ^ is_upside_down) * (height - crop_h)
        return left, top, crop_w, crop_h

    def _margins(self, image_hw: tuple[int, int]) -> np.ndarray:
        """Draw (4,) the distances of the crop's left, right, top and bottom edge from the image's, positive inside."""
        height, width = image_hw
        rng = self.random_generator
        margins = rng.uniform(-self.options.jitter, self.options.jitter, size=4) * (width, width, height, height)
        # One number for left and top and one for right and bottom: x and y zoom together.
        near, far = rng.uniform((1 - self.options.resize) / 2, (1 - 1 / self.options.resize) / 2, size=2)
        margins += np.array([near * width, far * width, near * height, far * height])
        if self.options.letterbox:
            bars = whole_placement(image_hw, self.input_hw, letterbox=True)
            bar_x, bar_y = bars.left_px / bars.scale_x, bars.top_px / bars.scale_y
            margins -= np.array([bar_x, bar_x, bar_y, bar_y])
        return margins
