"""From whole images to training Samples: crop, flip, colour and mosaic, drawn from one generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from data.albumentations_import import albumentations as A
from data.crop import JitteredCrop, LateCrop
from data.geometry import clip_boxes, visible
from data.mosaic import darknet_mosaic, draw_cut, mosaic
from data.photometric import HsvJitter, photometric_transforms
from utils.errors import UserError
from utils.knob import check_limits, knob
from utils.structures import Sample

MOSAIC_GEOMETRIES = ("content", "darknet")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentOptions:
    """The knobs of training augmentation; the defaults are those of darknet's yolov4.cfg."""

    mosaic: float = knob(
        0.5, "share of the training images that are made of four (cfg: mosaic=1 is a half)", low=0, high=1
    )
    mosaic_geometry: str = knob(
        "content",
        "a mosaic's windows and boxes: windows that show content where they can and boxes cut to their tile, or "
        "darknet's (with letter_box=1 too, which darknet refuses); its min_visibility is 0, its min_side_px 1",
        choices=MOSAIC_GEOMETRIES,
    )
    mosaic_bound: bool = knob(
        True, "cut a mosaic's boxes to their tiles; otherwise, in darknet's geometry only, to the whole image"
    )
    max_boxes: int | None = knob(
        None, "objects kept per training image, drawn at random (cfg, in darknet's geometry: max)", unit="N", low=1
    )
    flip: bool = knob(True, "mirror half of the images (off where a data set says that mirrors mislead)")
    jitter: float = knob(0.3, "each margin of the crop moves by up to this share of the side", low=0, high=0.45)
    resize: float = knob(1.5, "zoom between 1/resize and resize", low=1, high=10)
    letterbox: bool = knob(False, "keep the images' aspect ratio, here and in evaluation (cfg: letter_box)")
    saturation: float = knob(1.5, "saturation times or divided by up to this", low=1, high=100)
    exposure: float = knob(1.5, "brightness times or divided by up to this", low=1, high=100)
    hue: float = knob(0.1, "hue shifted by up to this share of the colour circle", low=0, high=0.5)
    blur: float = knob(0.0, "probability of Gaussian blur", low=0, high=1)
    noise: float = knob(0.0, "probability of Gaussian noise", low=0, high=1)
    min_visibility: float = knob(0.2, "objects with less of their area left after all cuts are dropped", low=0, high=1)
    min_side_px: float = knob(
        2.0, "objects with a shorter side left after all cuts are dropped", unit="PX", low=0, high=1000
    )
    fill: tuple[int, int, int] | None = None  # RGB around the image; None: its mean colour, as in darknet

    def __post_init__(self) -> None:
        check_limits(self)
        if self.mosaic_geometry != "darknet" and not self.mosaic_bound:
            raise UserError("boxes that run on beyond their tile, --no-mosaic-bound, need --mosaic-geometry darknet")


class Augmenter:
    """(index, input size, generator) -> training Sample; the same generator state gives the same Sample.

    load: index -> Sample, a whole image of any size with boxes in its own pixels. images: how many
    there are to draw a mosaic's other three tiles from.
    """

    def __init__(self, options: AugmentOptions, load: Callable[[int], Sample], images: int) -> None:
        self.options = options
        self.load = load
        self.images = images
        self._pipelines: dict[tuple[tuple[int, int], tuple[int, int] | None], A.Compose] = {}
        colour = photometric_transforms(
            saturation=options.saturation,
            exposure=options.exposure,
            hue=options.hue,
            blur=options.blur,
            noise=options.noise,
        )
        # What looks at single pixels can wait until it is known which of them a mosaic shows; blur and noise cannot.
        self._is_late = all(isinstance(each, HsvJitter) for each in colour)
        self._colour = colour

    def __call__(self, index: int, input_hw: tuple[int, int], rng: np.random.Generator) -> Sample:
        if rng.random() >= self.options.mosaic:
            sample, _ = self._jittered(index, input_hw, rng)
            sample = _within_input(replace(sample, image=sample.image[:, :]), **self._limits)
        else:
            indices = [index, *rng.integers(self.images, size=3).tolist()]
            make = self._darknet_mosaic if self.options.mosaic_geometry == "darknet" else self._mosaic
            sample = make(indices, input_hw, rng)
        return _at_most(self.options.max_boxes, sample, rng)

    def _mosaic(self, indices: list[int], input_hw: tuple[int, int], rng: np.random.Generator) -> Sample:
        tiles = [self._jittered(each, input_hw, rng) for each in indices]
        return mosaic(
            [sample for sample, _ in tiles],
            cut_xy=draw_cut(rng, input_hw),
            contents=np.stack([content for _, content in tiles]),
            **self._limits,
        )

    def _darknet_mosaic(self, indices: list[int], input_hw: tuple[int, int], rng: np.random.Generator) -> Sample:
        """Half of the crops are pushed into the corner of their image that lies outside in the mosaic."""
        tiles = []
        for tile, each in enumerate(indices):
            row, column = divmod(tile, 2)
            corner = (column, row) if rng.random() < 0.5 else None
            tiles.append(self._jittered(each, input_hw, rng, corner))
        return darknet_mosaic(
            [_within_input(sample, **self._limits) for sample, _ in tiles],
            cut_xy=draw_cut(rng, input_hw),
            contents=np.stack([content for _, content in tiles]),
            bound=self.options.mosaic_bound,
            **self._limits,
        )

    @property
    def _limits(self) -> dict[str, float]:
        return {"min_visibility": self.options.min_visibility, "min_side_px": self.options.min_side_px}

    def _jittered(
        self,
        index: int,
        input_hw: tuple[int, int],
        rng: np.random.Generator,
        corner: tuple[int, int] | None = None,
    ) -> tuple[Sample, np.ndarray]:
        """The image warped to the input, and (4,) xyxy where it lies there; boxes may reach outside.

        Its image may be a Warped, which only slices can be taken of.

        Corners travel as albumentations keypoints, because its boxes come back clipped: how much of an
        object is left could then not be told after a mosaic. Keypoints are pixel centres, so edges are
        half a pixel off.
        """
        source = self.load(index)
        height, width = source.image.shape[:2]
        boxes = np.concatenate([np.array([[0, 0, width, height]], np.float32), source.boxes])
        # All transforms draw from one stream: Compose.set_random_seed would give each the same numbers.
        pipeline = self._pipeline(input_hw, corner)
        state = rng, random.Random(int(rng.integers(2**31)))
        pipeline.set_random_state(*state)
        result = pipeline(image=source.image, keypoints=_corners(boxes) - 0.5)
        corners = result["keypoints"].reshape(-1, 4, 2) + 0.5
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
        sample = Sample(
            image=self._late(pipeline, corners[0], state) if self._is_late else result["image"],
            boxes=boxes[1:],
            labels=source.labels,
            is_crowd=source.is_crowd,
            image_id=source.image_id,
            path=source.path,
        )
        return sample, boxes[0]

    def _late(self, pipeline: A.Compose, corners: np.ndarray, state: tuple[np.random.Generator, random.Random]) -> Any:
        """What `pipeline` has drawn for an image, whose (4, 2) corners it has moved, and its change of colour."""
        (crop,) = (each for each in pipeline.transforms if isinstance(each, LateCrop))
        # A mirror before the crop is in its source already.
        mirrored = crop is pipeline.transforms[0] and corners[0, 0] > corners[1, 0]
        colour = None
        for jitter in self._colour:
            jitter.set_random_state(*state)
            colour = partial(jitter.apply, **jitter.get_params())
        return replace(crop.warped, mirrored=bool(mirrored), colour=colour)

    def _pipeline(self, input_hw: tuple[int, int], corner: tuple[int, int] | None) -> A.Compose:
        """Kept, since multi-scale training comes back to the same few input sizes."""
        if (input_hw, corner) not in self._pipelines:
            options = self.options
            crop = (LateCrop if self._is_late else JitteredCrop)(
                input_hw=input_hw,
                jitter=options.jitter,
                resize=options.resize,
                keep_aspect=options.letterbox,
                fill=options.fill,
                corner=corner,
            )
            flip = A.HorizontalFlip(p=0.5 if options.flip else 0.0)
            self._pipelines[input_hw, corner] = A.Compose(
                # A corner is one of the image as the mosaic shows it, so of a mirrored one it is another.
                [*((crop, flip) if corner is None else (flip, crop)), *([] if self._is_late else self._colour)],
                keypoint_params=A.KeypointParams("xy", remove_invisible=False, check_each_transform=False),
            )
        return self._pipelines[input_hw, corner]


def _corners(boxes: np.ndarray) -> np.ndarray:
    """(M, 4) xyxy -> (4 * M, 2): all four, so that a transform that rotates would be right as well."""
    return boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)


def _within_input(sample: Sample, *, min_visibility: float, min_side_px: float) -> Sample:
    height, width = sample.image.shape[:2]
    cut = clip_boxes(sample.boxes, (0, 0, width, height))
    keep = visible(sample.boxes, cut, sample.is_crowd, min_visibility=min_visibility, min_side_px=min_side_px)
    return Sample(
        image=sample.image,
        boxes=cut[keep],
        labels=sample.labels[keep],
        is_crowd=sample.is_crowd[keep],
        image_id=sample.image_id,
        path=sample.path,
    )


def _at_most(count: int | None, sample: Sample, rng: np.random.Generator) -> Sample:
    """Of more than `count` objects so many, drawn at random, in their order."""
    if count is None or len(sample.labels) <= count:
        return sample
    keep = np.sort(rng.permutation(len(sample.labels))[:count])
    return replace(sample, boxes=sample.boxes[keep], labels=sample.labels[keep], is_crowd=sample.is_crowd[keep])
