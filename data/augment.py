"""Training augmentation: crop, flip, rotation, colour, mosaic and mixing, all drawn from one generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np

from data.albumentations_import import albumentations as A
from data.augment_options import AugmentOptions
from data.balance import images_at
from data.crop import JitteredCrop, Warped
from data.geometry import clip_boxes, visible
from data.mixing import cutmix, draw_window, mixup
from data.mosaic import darknet_mosaic, draw_cut, mosaic
from data.photometric import photometric_transforms
from data.user_pipeline import UserPipeline
from utils.structures import Sample


class Augmenter:
    """(index, input size, generator) -> training Sample; the same generator state gives the same Sample.

    load: index -> Sample, a whole image of any size with boxes in its own pixels. images: number of images that a
    mosaic's other three tiles, and what is mixed in, are drawn from; shares: (images,) how often each, if not equally.
    domains: (images,) ascending; if given, they are drawn from the same domain.
    """

    def __init__(
        self,
        options: AugmentOptions,
        load: Callable[[int], Sample],
        images: int,
        shares: np.ndarray | None = None,
        domains: np.ndarray | None = None,
    ) -> None:
        self.options = options
        self.load = load
        self.images = images
        self._domains = domains
        self._single = replace(options, mosaic=0.0, mixup=0.0, cutmix=0.0)
        self._share_ends = None if shares is None else np.cumsum(shares)
        text = options.albumentations
        self._user = None if text is None else UserPipeline(text, options.min_visibility)
        self._pipelines: dict[tuple[tuple[int, int], tuple[int, int] | None], A.Compose] = {}
        self._colour = photometric_transforms(options)

    def __call__(
        self, index: int, input_hw: tuple[int, int], rng: np.random.Generator, *, is_single: bool = False
    ) -> Sample:
        """Make a Sample; with is_single of this image only, without mosaic, mixup and cutmix."""
        options = self._single if is_single else self.options
        sample = self._scene(index, input_hw, rng, options)
        if options.mixup and rng.random() < options.mixup:
            sample = mixup(sample, self._scene(self._drawn(rng, 1, index)[0], input_hw, rng, options))
        if options.cutmix and rng.random() < options.cutmix:
            other = self._scene(self._drawn(rng, 1, index)[0], input_hw, rng, options)
            sample = cutmix(sample, other, options, window=draw_window(rng, input_hw))
        if options.max_boxes is None or len(sample.labels) <= options.max_boxes:
            return sample
        return sample.where(np.sort(rng.permutation(len(sample.labels))[: options.max_boxes]))

    def _scene(
        self, index: int, input_hw: tuple[int, int], rng: np.random.Generator, options: AugmentOptions
    ) -> Sample:
        """Make the image by itself or, as often as asked, a mosaic that begins with it."""
        if rng.random() >= options.mosaic:
            sample, _ = self._jittered(index, input_hw, rng)
            return _within_input(replace(sample, image=sample.image[:, :]), options)
        return self._mosaic([index, *self._drawn(rng, 3, index)], input_hw, rng)

    def _drawn(self, rng: np.random.Generator, count: int, index: int) -> list[int]:
        """Draw images to join with the image `index`, or to mix into it."""
        first, stop = 0, self.images
        if self._domains is not None:
            first, stop = (
                int(np.searchsorted(self._domains, self._domains[index], side)) for side in ("left", "right")
            )
        if self._share_ends is None:
            return rng.integers(first, stop, size=count).tolist()
        before = self._share_ends[first - 1] if first else 0.0
        return (first + images_at(rng.random(count), self._share_ends[first:stop] - before)).tolist()

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
        if self._user:
            source = self._user(source, rng)
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
        if self.options.rotate:
            boxes[1:] = np.where(source.is_crowd[:, None], boxes[1:], ellipse_boxes(corners[1:]))
        image = cast(np.ndarray, self._warped(pipeline, corners[0], state))
        return replace(source, image=image, boxes=boxes[1:]), boxes[0]

    def _warped(
        self, pipeline: A.Compose, corners: np.ndarray, state: tuple[np.random.Generator, random.Random]
    ) -> Warped | np.ndarray:
        """Return the image that `pipeline` has drawn and whose (4, 2) corners it has moved, with colours drawn now."""
        (crop,) = (each for each in pipeline.transforms if isinstance(each, JitteredCrop))
        # If mirroring comes before the crop, the crop's source is mirrored already. After it, it has turned the corners
        # the other way round than the crop.
        (across, down), ((xx, xy, _), (yx, yy, _)) = corners[[1, 3]] - corners[0], crop.warped.matrix
        turn = (across[0] * down[1] - across[1] * down[0]) * (xx * yy - xy * yx)
        warped = replace(crop.warped, mirrored=bool(crop is pipeline.transforms[0] and turn < 0))
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


def ellipse_boxes(corners: np.ndarray) -> np.ndarray:
    """Return (M, 4) xyxy around the ellipses inscribed in boxes that are parallelograms by now, given by (M, 4, 2).

    Few objects fill the corners of their box: the box around a rotated box would mostly be too large. Source: Kalra et
    al. 2021, Towards Rotation Invariance in Object Detection (arXiv:2109.13488).
    """
    centre = corners.mean(axis=1)
    half = np.hypot(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0]) / 2
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def _within_input(sample: Sample, options: AugmentOptions) -> Sample:
    """Clip boxes to the input, and drop those with too little left."""
    height, width = sample.image.shape[:2]
    cut = clip_boxes(sample.boxes, (0, 0, width, height))
    return replace(sample, boxes=cut).where(visible(sample.boxes, cut, sample.is_crowd, options))
