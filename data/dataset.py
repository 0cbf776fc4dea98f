"""The pictures of an ImageSet as Samples: augmented for training, whole for evaluation."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from data.augment import Augmenter, AugmentOptions
from data.geometry import GREY, as_input, resize
from data.image_set import ImageSet, Record
from data.picture import read_picture
from utils.errors import UserError
from utils.structures import Sample

log = logging.getLogger(__name__)

# Training pictures are kept at up to this multiple of the input: zooming in still finds detail to show.
_DETAIL = 1.5


class Key(NamedTuple):
    """What a training Sample is made from; whoever holds the key makes the same Sample."""

    epoch: int
    position: int
    picture: int
    input_hw: tuple[int, int]


class ShrunkPictures:
    """index -> Sample, a whole picture with its longer side at most `longest_px`, boxes in its own pixels.

    Decoded pictures stay in memory until `cache_bytes` are full; the early ones are never thrown out, since
    an epoch comes back to every picture and evicting the oldest would never find one. A picture that turns
    out to be unreadable is replaced by the next one that is not.
    """

    def __init__(self, image_set: ImageSet, *, longest_px: int, cache_bytes: int) -> None:
        self.image_set = image_set
        self.longest_px = longest_px
        self.cache_bytes_left = cache_bytes
        self._images: dict[int, np.ndarray] = {}
        self._unreadable: set[int] = set()

    def __call__(self, index: int) -> Sample:
        count = len(self.image_set)
        for candidate in (np.arange(count) + index) % count:
            record = self.image_set[int(candidate)]
            image = self._image(int(candidate), record)
            if image is not None:
                return _whole(record, image)
        raise UserError(f"{self.image_set.name}: none of its {count} pictures can be read.")

    def _image(self, index: int, record: Record) -> np.ndarray | None:
        if index in self._images:
            return self._images[index]
        if index in self._unreadable:
            return None
        image = read_picture(record.path, source_hw=record.hw, enough_px=self.longest_px)
        if image is None:
            self._unreadable.add(index)
            log.warning("%s: unreadable, another picture is used in its place", record.path)
            return None
        image = _shrunk(image, self.longest_px)
        if image.nbytes <= self.cache_bytes_left:
            self.cache_bytes_left -= image.nbytes
            self._images[index] = image
        return image


class TrainDataset(Dataset[Sample]):
    """Key -> Sample, the same in whichever process it is asked for.

    largest_hw: the largest input size to come; cache_bytes: of this process.
    """

    def __init__(
        self,
        image_set: ImageSet,
        *,
        augment: AugmentOptions,
        seed: int,
        largest_hw: tuple[int, int],
        cache_bytes: int,
    ) -> None:
        longest_px = int(_DETAIL * max(largest_hw))
        pictures = ShrunkPictures(image_set, longest_px=longest_px, cache_bytes=cache_bytes)
        self.augmenter = Augmenter(augment, pictures, len(image_set))
        self.seed = seed
        self.length = len(image_set)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key) -> Sample:
        rng = np.random.default_rng([self.seed, key.epoch, key.position])
        return self.augmenter(key.picture, key.input_hw, rng)


class EvalDataset(Dataset[Sample]):
    """Picture i of the set, whole, with its Placement.

    It is decoded at full size: reduced decoding is quick, but would change the scores a little. An
    unreadable picture comes as grey with its objects, which then count as missed. resize: of geometry.RESIZES.
    """

    def __init__(
        self, image_set: ImageSet, *, input_hw: tuple[int, int], letterbox: bool, resize: str = "opencv"
    ) -> None:
        self.image_set = image_set
        self.input_hw = input_hw
        self.letterbox = letterbox
        self.resize = resize

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int) -> Sample:
        record = self.image_set[index]
        image = read_picture(record.path, source_hw=record.hw)
        if image is None:
            log.warning("%s: unreadable, evaluated as a grey picture", record.path)
            image = np.full((*record.hw, 3), GREY, np.uint8)
        image = resize(image, record.hw)  # the annotations' size rules; nearly always the same
        laid, placement = as_input(image, self.input_hw, letterbox=self.letterbox, how=self.resize)
        return Sample(
            image=laid,
            boxes=placement.to_input(record.boxes),
            labels=record.labels,
            is_crowd=record.is_crowd,
            image_id=record.image_id,
            path=record.path,
            placement=placement,
        )


def _shrunk(image: np.ndarray, longest_px: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = longest_px / max(height, width)
    if scale >= 1:
        return image
    return resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))


def _whole(record: Record, image: np.ndarray) -> Sample:
    """Boxes follow from the annotated size to the image's."""
    scale_y, scale_x = image.shape[0] / record.hw[0], image.shape[1] / record.hw[1]
    return Sample(
        image=image,
        boxes=record.boxes * np.array([scale_x, scale_y, scale_x, scale_y], np.float32),
        labels=record.labels,
        is_crowd=record.is_crowd,
        image_id=record.image_id,
        path=record.path,
    )
