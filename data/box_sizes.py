"""Box sizes of a data set, in input pixels and relative to the images."""

from __future__ import annotations

import numpy as np

from data.image_set import ImageSet
from utils.letterbox import whole_placement


def input_sides(image_set: ImageSet, input_hw: tuple[int, int], letterbox: bool) -> np.ndarray:
    """Return (M, 2) width and height of every object in input pixels, including crowds."""
    sizes, of_size = np.unique(image_set.hws, axis=0, return_inverse=True)
    placements = [whole_placement((h, w), input_hw, letterbox=letterbox) for h, w in sizes.tolist()]
    scales = np.array([(placement.scale_x, placement.scale_y) for placement in placements])
    return (image_set.boxes[:, 2:] - image_set.boxes[:, :2]) * scales[of_size.reshape(-1)[image_set.owners]]


def relative_sides(image_set: ImageSet) -> np.ndarray:
    """Return (M,) the square root of each box's area relative to its image's area."""
    areas = (image_set.boxes[:, 2:] - image_set.boxes[:, :2]).prod(axis=1, dtype=np.float64)
    return np.sqrt(areas / image_set.hws.prod(axis=1, dtype=np.float64)[image_set.owners])
