"""Colour jitter, plus optional blur and noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np

from data.albumentations_import import albumentations as A
from data.augment_options import AugmentOptions


class HsvJitter(A.ImageOnlyTransform):  # type: ignore[misc]
    """Darknet's colour jitter on 8-bit HSV, where OpenCV's hue is 0..179.

    saturation, exposure: >= 1; S and V are multiplied by a factor drawn from 1..s and inverted half of the time. hue:
    shift by up to this share of the colour circle, either way. Source: darknet, `image_opencv.cpp`,
    image_data_augmentation; there a negative hue is clipped to 0, here it wraps around.
    """

    def __init__(self, *, saturation: float, exposure: float, hue: float) -> None:
        super().__init__(p=1.0)
        self.saturation = saturation
        self.exposure = exposure
        self.hue = hue

    def get_params(self) -> dict[str, Any]:
        return {
            "saturation_factor": self._factor(self.saturation),
            "exposure_factor": self._factor(self.exposure),
            "hue_shift": self.random_generator.uniform(-self.hue, self.hue),
        }

    def draw(self) -> Callable[[np.ndarray], np.ndarray]:
        """Draw the parameters for one image. Returns the change of its pixels, of which a mosaic needs only a part."""
        return partial(self.apply, **self.get_params())

    def apply(
        self,
        img: np.ndarray,
        saturation_factor: float,
        exposure_factor: float,
        hue_shift: float,
        **params: Any,
    ) -> np.ndarray:
        levels = np.arange(256, dtype=np.float32)
        table = np.stack(
            [(levels + 180 * hue_shift) % 180, levels * saturation_factor, levels * exposure_factor], axis=-1
        )
        table = table.clip(0, 255).astype(np.uint8).reshape(1, 256, 3)
        return cv2.cvtColor(cv2.LUT(cv2.cvtColor(img, cv2.COLOR_RGB2HSV), table), cv2.COLOR_HSV2RGB)

    def _factor(self, limit: float) -> float:
        factor = self.random_generator.uniform(1, limit)
        return factor if self.random_generator.random() < 0.5 else 1 / factor


def photometric_transforms(options: AugmentOptions) -> list[A.BasicTransform]:
    """Build the transforms that are on. Kernels of the blur are 3 to 7 px, noise is 2 to 10 % of white."""
    transforms: list[A.BasicTransform] = []
    if (options.saturation, options.exposure, options.hue) != (1, 1, 0):
        transforms.append(HsvJitter(saturation=options.saturation, exposure=options.exposure, hue=options.hue))
    if options.blur:
        transforms.append(A.GaussianBlur(blur_limit=(3, 7), p=options.blur))
    if options.noise:
        transforms.append(A.GaussNoise(std_range=(0.02, 0.1), p=options.noise))
    return transforms
