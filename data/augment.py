"""Training augmentation: crop, flip, colour and mosaic, all drawn from one generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np

from data.albumentations_import import albumentations as A
from data.augment_options import AugmentOptions
from data.crop import JitteredCrop, Warped
from data.geometry import clip_boxes, visible
from data.mosaic import darknet_mosaic, draw_cut, mosaic
from data.photometric import photometric_transforms
from utils.structures import Sample


class Augmenter:
    """(index, input size, generator) -> training Sample; the same generator state gives the same Sample.

    load: index -> Sample, a whole image of any size with boxes in its own pixels. images: number of images that a
    mosaic's other three tiles are drawn from.
    """

    def __init__(self, options: AugmentOptions, load: Callable[[int], Sample], images: int) -> None:
        self.options = options
        self.load = load
        self.images = images
        self._pipelines: dict[tuple[tuple[int, int], tuple[int, int] | None], A.Compose] = {}
        self._colour = photometric_transforms(options)

    def __call__(self, index: int, input_hw: tuple[int, int], rng: np.random.Generator) -> Sample:
        if rng.random() >= self.options.mosaic:
            sample, _ = self._jittered(index, input_hw, rng)
            sample = _within_input(replace(sample, image=sample.image[:, :]), self.options)
        else:
            indices = [index, *rng.integers(self.images, size=3).tolist()]
            sample = self._mosaic(indices, input_hw, rng)
        if self.options.max_boxes is None or len(sample.labels) <= self.options.max_boxes:
            return sample
        return sample.where(np.sort(rng.permutation(len(sample.labels))[: self.options.max_boxes]))

    def _mosaic(self, indices: list[int], input_hw: tuple[int, int], rng: np.random.Generator) -> Sample:
        """Join four crops. In darknet's geometry half of them come from the image's corner that is the mosaic's."""
        is_darknet = self.options.mosaic_geometry == "darknet"
        samples, contents = [], []
        for tile, index in enumerate(indices):
            row, column = divmod(tile, 2)
            corner = (column, row) if is_darknet and rng.random() < 0.5 else None
            sample, content = self._jittered(index, input_hw, rng, corner)
            samples.append(_within_input(sample, self.options) if is_darknet else sample)
            contents.append(content)
        join = darknet_mosaic if is_darknet else mosaic
        return join(samples, self.options, cut_xy=draw_cut(rng, input_hw), contents=np.stack(contents))

    def _jittered(
        self,
        index: int,
        input_hw: tuple[int, int],
        rng: np.random.Generator,
        corner: tuple[int, int] | None = None,
    ) -> tuple[Sample, np.ndarray]:
        """Return the image warped to the input, and (4,) xyxy where it lies there; boxes may reach outside.

        The Sample's image may be a Warped, which only supports slicing. All four corners are passed as albumentations
        keypoints, because its boxes come back clipped, without the area that `min_visibility` needs. Keypoints are
        pixel centres, half a pixel off the edges.
        """
        source = self.load(index)
        height, width = source.image.shape[:2]
        boxes = np.concatenate([np.array([[0, 0, width, height]], np.float32), source.boxes])
        # All transforms draw from one stream: set_random_seed would give each the same numbers.
        pipeline = self._pipeline(input_hw, corner)
        state = rng, random.Random(int(rng.integers(2**31)))
        pipeline.set_random_state(*state)
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
        result = pipeline(image=source.image, keypoints=corners - 0.5)
        corners = result["keypoints"].reshape(-1, 4, 2) + 0.5
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
        image = cast(np.ndarray, self._warped(pipeline, corners[0], state))
        return replace(source, image=image, boxes=boxes[1:]), boxes[0]

    def _warped(
        self, pipeline: A.Compose, corners: np.ndarray, state: tuple[np.random.Generator, random.Random]
    ) -> Warped | np.ndarray:
        """Return the image that `pipeline` has drawn and whose (4, 2) corners it has moved, with colours drawn now."""
        (crop,) = (each for each in pipeline.transforms if isinstance(each, JitteredCrop))
        # If mirroring comes before the crop, the crop's source is mirrored already.
        mirrored = crop is pipeline.transforms[0] and corners[0, 0] > corners[1, 0]
        warped = replace(crop.warped, mirrored=bool(mirrored))
        for transform in self._colour:
            transform.set_random_state(*state)
        if all(hasattr(transform, "draw") for transform in self._colour):  # transforms of single pixels: drawn later
            return replace(warped, recolour=[transform.draw() for transform in self._colour])
        image = warped[:, :]  # blur and noise need the whole image
        for transform in self._colour:
            image = transform(image=image)["image"]
        return image

    def _pipeline(self, input_hw: tuple[int, int], corner: tuple[int, int] | None) -> A.Compose:
        """Return the transforms of a training image; cached, as multi-scale training returns to few input sizes."""
        if (input_hw, corner) not in self._pipelines:
            crop = JitteredCrop(self.options, input_hw, corner)
            flip = A.HorizontalFlip(p=0.5 if self.options.flip else 0.0)
            self._pipelines[input_hw, corner] = A.Compose(
                # A corner is that of the image as the mosaic shows it, so mirroring comes first.
                [crop, flip] if corner is None else [flip, crop],
                keypoint_params=A.KeypointParams("xy", remove_invisible=False, check_each_transform=False),
            )
        return self._pipelines[input_hw, corner]


def _within_input(sample: Sample, options: AugmentOptions) -> Sample:
    """Clip boxes to the input, and drop those with too little left."""
    height, width = sample.image.shape[:2]
    cut = clip_boxes(sample.boxes, (0, 0, width, height))
    return replace(sample, boxes=cut).where(visible(sample.boxes, cut, sample.is_crowd, options))
