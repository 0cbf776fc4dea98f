"""Batches in an order that depends on (seed, epoch) only, whatever the number of workers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from data.augment import AugmentOptions
from data.batch import collate
from data.dataset import EvalDataset, Key, TrainDataset
from data.image_set import ImageSet
from utils.errors import UserError
from utils.structures import Batch

_STRIDE_PX = 32
_BATCHES_PER_SIZE = 10
_CACHE_BYTES = 1 << 30

# The last entry of a seed: shuffling and sizes must not draw the numbers of a Sample (seed, epoch, position).
_ORDER, _SIZE = 1, 2


class EpochKeys(Sampler[list[Key]]):
    """The batches of one epoch as lists of Keys.

    Pictures that do not fill a last batch sit out the epoch; a set smaller than one batch makes one smaller
    batch. multi_scale: the input size is drawn anew every 10 batches, between size / multi_scale and
    size * multi_scale; darknet's `random=1` is 1.4.
    """

    def __init__(
        self, pictures: int, *, batch_size: int, input_hw: tuple[int, int], multi_scale: float, seed: int
    ) -> None:
        self.pictures = pictures
        self.batch_size = min(batch_size, pictures)
        self.input_hw = input_hw
        self.multi_scale = multi_scale
        self.seed = seed
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        return self.pictures // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng([self.seed, self.epoch, 0, _ORDER]).permutation(self.pictures).tolist()
        for batch in range(self.start_batch, len(self)):
            hw = self.hw_of_batch(self.epoch * len(self) + batch)
            start = batch * self.batch_size
            yield [Key(self.epoch, at, order[at], hw) for at in range(start, start + self.batch_size)]

    def hw_of_batch(self, global_batch: int) -> tuple[int, int]:
        """Both sides follow the same factor, u or 1/u with u in 1..multi_scale, in steps of 32 px."""
        if self.multi_scale == 1:
            return self.input_hw
        rng = np.random.default_rng([self.seed, global_batch // _BATCHES_PER_SIZE, 0, _SIZE])
        factor = rng.uniform(1, self.multi_scale)
        factor = factor if rng.random() < 0.5 else 1 / factor
        height, width = (self._stepped(side, factor) for side in self.input_hw)
        return height, width

    def largest_hw(self) -> tuple[int, int]:
        height, width = (self._stepped(side, self.multi_scale) for side in self.input_hw)
        return height, width

    def smallest_hw(self) -> tuple[int, int]:
        if self.multi_scale == 1:
            return self.input_hw
        height, width = (self._stepped(side, 1 / self.multi_scale) for side in self.input_hw)
        return height, width

    def _stepped(self, side_px: int, factor: float) -> int:
        smallest = math.ceil(side_px / self.multi_scale / _STRIDE_PX)
        largest = math.floor(side_px * self.multi_scale / _STRIDE_PX)
        return _STRIDE_PX * min(max(round(side_px * factor / _STRIDE_PX), smallest, 1), max(largest, 1))


class TrainLoader:
    """Iterating it gives the Batches of the announced epoch, from the announced batch on.

    Announce before iterating; the length is that of a whole epoch.
    """

    def __init__(self, dataset: TrainDataset, keys: EpochKeys, workers: int) -> None:
        self.keys = keys
        self._loader = DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            # Its own, or every epoch would take a number from torch's global stream.
            generator=torch.Generator().manual_seed(keys.seed),
        )

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    @property
    def batch_size(self) -> int:
        """Of every batch: less than was asked for where there are fewer pictures."""
        return self.keys.batch_size

    @property
    def smallest_hw(self) -> tuple[int, int]:
        return self.keys.smallest_hw()

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """start_batch: batches of this epoch that were trained on before a run was interrupted."""
        self.keys.epoch = epoch
        self.keys.start_batch = start_batch


def make_train_loader(
    image_set: ImageSet,
    *,
    batch_size: int,
    input_hw: tuple[int, int],
    multi_scale: float,
    augment: AugmentOptions,
    seed: int,
    workers: int,
    cache_bytes: int = _CACHE_BYTES,
) -> TrainLoader:
    """cache_bytes: of memory for decoded pictures, shared out among the workers."""
    if batch_size < 1 or workers < 0 or multi_scale < 1:
        raise UserError(
            f"batch_size={batch_size} must be at least 1, workers={workers} at least 0 "
            f"and multi_scale={multi_scale} at least 1."
        )
    keys = EpochKeys(len(image_set), batch_size=batch_size, input_hw=input_hw, multi_scale=multi_scale, seed=seed)
    dataset = TrainDataset(
        image_set,
        augment=augment,
        seed=seed,
        largest_hw=keys.largest_hw(),
        cache_bytes=cache_bytes // max(1, workers),
    )
    return TrainLoader(dataset, keys, workers)


def make_eval_loader(
    image_set: ImageSet,
    *,
    batch_size: int,
    input_hw: tuple[int, int],
    letterbox: bool,
    workers: int,
    resize: str = "opencv",
) -> DataLoader[Batch]:
    """Every picture once, in the order of the set; the last batch may be smaller. resize: of geometry.RESIZES."""
    return DataLoader(
        EvalDataset(image_set, input_hw=input_hw, letterbox=letterbox, resize=resize),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),
    )


def _start_worker(worker: int) -> None:
    """One thread each: workers are the parallelism."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
