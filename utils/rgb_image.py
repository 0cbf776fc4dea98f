"""Images as people have them (a path, of Pillow, of numpy) -> RGB pixels."""

from __future__ import annotations

import os
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.image_file import read_image

AnyImage: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray
_DEEP_MODES = ("I", "F")  # of Pillow: more than 8 bits a channel, whose range it does not tell


def rgb_of(image: AnyImage) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB of an image file, an image of Pillow, or an array (H, W, 3) or grey (H, W) uint8 RGB.

    Files and Pillow's images are turned as their EXIF tag says; transparency is dropped. Raises UserError for a file
    that cannot be read, TypeError and ValueError for what is no such image.
    """
    if isinstance(image, str | os.PathLike):
        return _of_file(os.path.expanduser(os.fspath(image)))
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    if isinstance(image, np.ndarray):
        return _of_array(image)
    raise TypeError(f"an image is a path, an image of Pillow or a numpy array, not of type {type(image).__name__}")


def _of_file(path: str) -> np.ndarray:
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder: give the paths of its images, as a list")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such image")
    rgb = read_image(path)
    if rgb is None:
        raise UserError(f"{path}: cannot be read as an image")
    return rgb


def _of_pillow(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(_DEEP_MODES):
        raise ValueError(f"an image of Pillow's mode {image.mode} is not of 8 bits a channel: scale it to 0..255 first")
    return _of_array(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))


def _of_array(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8:
        raise TypeError(f"an array of an image is uint8 in 0..255, not {image.dtype}")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim == 4:
        raise ValueError(f"an array of shape {image.shape} is several images: give a list of them")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an array of an image is (H, W, 3) RGB or (H, W) grey, not of shape {image.shape}")
    if image.size == 0:
        raise ValueError(f"an image of shape {image.shape} has no pixels")
    return np.ascontiguousarray(image)  # a view such as bgr[..., ::-1] is not
