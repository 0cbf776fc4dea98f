"""Batches in an order that depends on (seed, epoch) only, whatever the number of workers and of ranks."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from data.augment import AugmentOptions
from data.batch import collate
from data.dataset import EvalDataset, EvalKey, SampleKey, TrainDataset, longest_px_for
from data.geometry import letterbox_placement
from data.image_cache import open_cache
from data.image_set import ImageSet
from data.workers import Workers
from utils.environment import cuda_is_in_use
from utils.errors import UserError
from utils.structures import Batch, Sample

_BATCHES_PER_SIZE = 10

# The last entry of a seed: shuffling and sizes must not draw the numbers of a Sample (seed, epoch, position).
_ORDER, _SIZE = 1, 2


class TrainBatchSampler:
    """The batches of one epoch as lists of Keys: of each batch the `rank`-th of `ranks` equal slices.

    Images that do not fill a last batch sit out the epoch; a set smaller than one batch makes one smaller
    batch. multi_scale: the input size is drawn anew every 10 batches, between size / multi_scale and
    size * multi_scale, in steps of step_px; darknet's `random=1` is 1.4. batch_size counts the images of all
    ranks; UserError where it cannot be dealt out evenly.
    """

    def __init__(
        self,
        images: int,
        *,
        batch_size: int,
        input_hw: tuple[int, int],
        multi_scale: float,
        seed: int,
        step_px: int = 32,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.images = images
        self.batch_size = min(batch_size, images)
        if self.batch_size % ranks:
            whole = "" if self.batch_size == batch_size else f", all that the {images} images of the set allow,"
            raise UserError(f"a batch of {self.batch_size} images{whole} is not divisible by the {ranks} ranks.")
        self.input_hw = input_hw
        self.multi_scale = multi_scale
        self.step_px = step_px
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.random.default_rng([self.seed, self.epoch, 0, _ORDER]).permutation(self.images).tolist()
        for batch in range(self.start_batch, len(self)):
            hw = self.hw_of_batch(self.epoch * len(self) + batch)
            share = self.batch_size // self.ranks
            start = batch * self.batch_size + self.rank * share
            yield [SampleKey(self.epoch, at, order[at], hw) for at in range(start, start + share)]

    def hw_of_batch(self, global_batch: int) -> tuple[int, int]:
        """Both sides follow the same factor, u or 1/u with u in 1..multi_scale, in steps of step_px."""
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
        smallest = math.ceil(side_px / self.multi_scale / self.step_px)
        largest = math.floor(side_px * self.multi_scale / self.step_px)
        return self.step_px * min(max(round(side_px * factor / self.step_px), smallest, 1), max(largest, 1))


class BatchKeys(Protocol):
    """For each batch the keys of its samples, as the dataset takes them."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Any]]: ...


class Loader:
    """Iterating it gives a Batch for each list of keys, made ahead of time by `workers` processes.

    One iteration at a time: a new one ends an older. Where CUDA is in use the batches lie in page-locked memory.
    """

    def __init__(self, dataset: Dataset[Sample], keys: BatchKeys, workers: int) -> None:
        self.keys = keys
        self._make = partial(_batch_of, dataset)
        self._workers = Workers(self._make, workers) if workers else None

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._workers.batches(self.keys) if self._workers else (self._make(keys) for keys in self.keys)
        return _pinned(batches) if cuda_is_in_use() else batches

    @property
    def worker_pids(self) -> list[int]:
        """Of the processes that are running now."""
        return self._workers.pids if self._workers else []


class TrainLoader(Loader):
    """The Batches of the announced epoch, from the announced batch on: this rank's slice of each.

    Announce before iterating; the length is that of a whole epoch.
    """

    keys: TrainBatchSampler

    @property
    def batch_size(self) -> int:
        """Of every batch, over all ranks: less than was asked for where there are fewer images."""
        return self.keys.batch_size

    @property
    def smallest_hw(self) -> tuple[int, int]:
        return self.keys.smallest_hw()

    @property
    def largest_hw(self) -> tuple[int, int]:
        return self.keys.largest_hw()

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
    step_px: int = 32,
    rank: int = 0,
    ranks: int = 1,
    cache: str = "ram",
    cache_bytes: int | None = None,
    cache_folder: Path | None = None,
) -> TrainLoader:
    """batch_size: over all ranks. step_px: of the sizes that multi_scale draws. cache, cache_bytes, cache_folder: of
    decoded images, as of `open_cache`."""
    if batch_size < 1 or workers < 0 or multi_scale < 1:
        raise UserError(
            f"batch_size={batch_size} must be at least 1, workers={workers} at least 0 "
            f"and multi_scale={multi_scale} at least 1."
        )
    keys = TrainBatchSampler(
        len(image_set),
        batch_size=batch_size,
        input_hw=input_hw,
        multi_scale=multi_scale,
        seed=seed,
        step_px=step_px,
        rank=rank,
        ranks=ranks,
    )
    longest_px = longest_px_for(keys.largest_hw())
    dataset = TrainDataset(
        image_set,
        augment=augment,
        seed=seed,
        longest_px=longest_px,
        cache=open_cache(cache, image_set, longest_px=longest_px, limit_bytes=cache_bytes, folder=cache_folder),
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
    rank: int = 0,
    ranks: int = 1,
    rect: bool = False,
    step_px: int = 32,
) -> Loader:
    """Each image once, in the order of the set; the last batch may be smaller. resize: of geometry.RESIZES.

    Of several ranks each takes every `ranks`-th image, from `rank` on: none, where there are fewer of them.
    rect: images are sorted by their aspect ratio, and a batch's input is cut to what they take of `input_hw`:
    the same images with less grey around, in steps of step_px. UserError where they are not letterboxed.
    """
    if rect and not letterbox:
        raise UserError("rectangular batches are for letterboxed images; these are stretched to fill the input.")
    images = np.arange(rank, len(image_set), ranks)
    if rect:
        height, width = image_set.hws[images].T
        images = images[np.argsort(height / width, kind="stable")]
    keys = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        hw = rect_hw(image_set.hws[batch], input_hw, step_px) if rect else input_hw
        keys.append([EvalKey(image, hw) for image in batch.tolist()])
    return Loader(EvalDataset(image_set, letterbox=letterbox, resize=resize), keys, workers)


def rect_hw(hws: np.ndarray, input_hw: tuple[int, int], step_px: int) -> tuple[int, int]:
    """The smallest input, in steps of step_px, that shows letterboxed images (N, 2) as large as `input_hw` does."""
    inner = np.array([letterbox_placement((h, w), input_hw).image_px[::-1] for h, w in hws.tolist()]).max(axis=0)
    steps = np.ceil(np.round(inner) / step_px).astype(int)
    height, width = np.minimum(step_px * steps, input_hw).tolist()
    return height, width


def _batch_of(dataset: Dataset[Sample], keys: Sequence[Any]) -> Batch:
    return collate([dataset[key] for key in keys])


def _pinned(batches: Generator[Batch, None, None]) -> Iterator[Batch]:
    """The same in page-locked memory, copied there by a thread that is one batch ahead."""
    device = torch.cuda.current_device()  # or the thread would wake the first GPU for every rank
    source = (batch.pin_memory() for batch in batches)
    with closing(batches), ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        ahead = thread.submit(next, source, None)
        while (batch := ahead.result()) is not None:
            ahead = thread.submit(next, source, None)
            yield batch
