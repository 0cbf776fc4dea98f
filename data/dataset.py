"""Datasets over an ImageSet: augmented Samples for training, whole images for evaluation."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from data.augment import Augmenter
from data.augment_options import AugmentOptions
from data.image_cache import ImageCache, file_stamp, shrunk_hws
from data.image_set import ImageSet, Record
from utils.errors import UserError
from utils.image_file import hw_of_boxes, read_image
from utils.letterbox import GREY, as_input, resize
from utils.printable import printable
from utils.structures import Placement, Sample

log = logging.getLogger(__name__)


class SampleKey(NamedTuple):
    """All that determines a training Sample, in whichever process it is made. is_single: see `Augmenter`."""

    epoch: int
    position: int
    image: int
    input_hw: tuple[int, int]
    is_single: bool = False


@dataclass(eq=False)
class ShrunkImages:
    """index -> Sample, a whole image with its longer side about `longest_px` at most, boxes in its own pixels.

    An unreadable image is replaced by the next readable one of its domain. The result does not depend on the cache.
    """

    image_set: ImageSet
    longest_px: int
    cache: ImageCache | None = None
    _unreadable: set[int] = field(default_factory=set, init=False)

    def __call__(self, index: int) -> Sample:
        count = len(self.image_set)
        domains = self.image_set.domains
        for candidate in chain(range(index, count), range(index)):
            if domains is not None and domains[candidate] != domains[index]:
                continue
            record = self.image_set[candidate]
            image = self._image(candidate, record)
            if image is not None:
                height, width = hw_of_boxes(record.hw, image.shape[:2])
                scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2, np.float32)
                return _sample(record, image, record.boxes * scale)
        raise UserError(f"{self.image_set.name}: none of its {count} images can be read.")

    def _image(self, index: int, record: Record) -> np.ndarray | None:
        if index in self._unreadable:
            return None
        image = None if self.cache is None else self.cache.get(index)
        if image is not None:
            return image
        stamp = file_stamp(record.path)  # before reading: if the file is replaced meanwhile, it is read again
        image = read_image(record.path, source_hw=record.hw, enough_px=self.longest_px)
        if image is None:
            self._unreadable.add(index)
            log.warning("%s: unreadable, another image is used instead", printable(record.path))
            return None
        ((height, width),) = shrunk_hws(np.array([image.shape[:2]]), self.longest_px).tolist()
        image = resize(image, (height, width))
        if self.cache is not None:
            self.cache.put(index, image, stamp)
        return image


class TrainDataset(Dataset[Sample]):
    """SampleKey -> augmented Sample. shares: see `Augmenter`. is_apart: join and mix images of one domain only."""

    def __init__(
        self,
        images: ShrunkImages,
        augment: AugmentOptions,
        seed: int,
        shares: np.ndarray | None = None,
        *,
        is_apart: bool = False,
    ) -> None:
        self.domains = images.image_set.domains
        apart = self.domains if is_apart else None
        self.augmenter = Augmenter(augment, images, len(images.image_set), shares, apart)
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> Sample:
        rng = np.random.default_rng([self.seed, key.epoch, key.position])
        sample = self.augmenter(key.image, key.input_hw, rng, is_single=key.is_single)
        return sample if self.domains is None else replace(sample, domain=int(self.domains[key.image]))


class EvalKey(NamedTuple):
    """An image of the set and the input size it is laid into."""

    image: int
    input_hw: tuple[int, int]


@dataclass(eq=False)
class EvalDataset(Dataset[Sample]):
    """EvalKey -> Sample of the whole image, with its Placement.

    Images are decoded at full size: reduced decoding is quick, but would change the scores a little. An unreadable
    image becomes a grey one with its objects, which then count as missed. resize: one of geometry.RESIZES.
    """

    image_set: ImageSet
    letterbox: bool
    resize: str = "opencv"

    def __getitem__(self, key: EvalKey) -> Sample:
        record = self.image_set[key.image]
        image = read_image(record.path, source_hw=record.hw)
        if image is None:
            log.warning("%s: unreadable, evaluated as a grey image", printable(record.path))
            image = np.full((1, 1, 3), GREY, np.uint8)  # whatever size it may claim
        # The annotations' size decides; it nearly always is the image's.
        hw = hw_of_boxes(record.hw, image.shape[:2])
        laid, placement = as_input(image, key.input_hw, letterbox=self.letterbox, how=self.resize, source_hw=hw)
        return _sample(record, laid, placement.to_input(record.boxes), placement)


def _sample(record: Record, image: np.ndarray, boxes: np.ndarray, placement: Placement | None = None) -> Sample:
    return Sample(
        image=image,
        boxes=boxes,
        labels=record.labels,
        is_crowd=record.is_crowd,
        image_id=record.image_id,
        path=record.path,
        placement=placement,
    )
