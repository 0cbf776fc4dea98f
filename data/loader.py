"""Loaders of Batches whose order depends on (seed, epoch) only, not on the number of workers or ranks."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from data.augment_options import AugmentOptions
from data.balance import balanced_order, image_shares
from data.dataset import EvalDataset, EvalKey, SampleKey, ShrunkImages, TrainDataset
from data.domains import interleaved
from data.image_cache import open_cache
from data.image_set import ImageSet
from data.workers import Workers
from utils.environment import cuda_is_in_use
from utils.errors import UserError
from utils.letterbox import whole_placement
from utils.structures import Batch, Sample, Targets

_BATCHES_PER_SIZE = 10
_DETAIL = 1.5  # training images are kept at up to this multiple of the input, so that zooming in still shows detail

# The last entry of a seed: shuffling and sizes must not draw the numbers of a Sample (seed, epoch, position).
_ORDER, _SIZE = 1, 2


@dataclass(frozen=True, slots=True)
class InputSizes:
    """The input sizes of a training.

    With multi_scale > 1 a size is drawn every 10 batches, between base_hw / multi_scale and base_hw * multi_scale, in
    steps of step_px; darknet's `random=1` is 1.4.
    """

    base_hw: tuple[int, int]
    multi_scale: float = 1.0
    step_px: int = 32

    def of_batch(self, seed: int, batch: int) -> tuple[int, int]:
        """Return the size of a batch, counted over all epochs. Both sides follow one factor, u or 1/u, u >= 1."""
        if self.multi_scale == 1:
            return self.base_hw  # maybe not a multiple of step_px
        rng = np.random.default_rng([seed, batch // _BATCHES_PER_SIZE, 0, _SIZE])
        factor = rng.uniform(1, self.multi_scale)
        return self._scaled(factor if rng.random() < 0.5 else 1 / factor)

    @property
    def largest(self) -> tuple[int, int]:
        return self._scaled(self.multi_scale)

    @property
    def kept_px(self) -> int:
        """The longest side at which training images are kept."""
        return int(_DETAIL * max(self.largest))

    @property
    def smallest(self) -> tuple[int, int]:
        return self.base_hw if self.multi_scale == 1 else self._scaled(1 / self.multi_scale)

    def _scaled(self, factor: float) -> tuple[int, int]:
        height, width = (self._stepped(side, factor) for side in self.base_hw)
        return height, width

    def _stepped(self, side_px: int, factor: float) -> int:
        smallest = math.ceil(side_px / self.multi_scale / self.step_px)
        largest = math.floor(side_px * self.multi_scale / self.step_px)
        return self.step_px * min(max(round(side_px * factor / self.step_px), smallest, 1), max(largest, 1))


@dataclass(eq=False)
class TrainBatchSampler(Sampler[list[SampleKey]]):
    """The batches of one epoch as lists of SampleKeys: of each batch the `rank`-th of `ranks` equal slices.

    Images that do not fill a last batch sit out the epoch; a set smaller than one batch makes one smaller batch.
    batch_size counts the images of all ranks. Raises UserError if it is not divisible by `ranks`. shares: how often
    each image is shown, see `image_shares`; None shows each once. single_from: the first batch without mosaic, mixup
    and cutmix, counted over all epochs. domains: of each image; each stretch of the order then has every domain's share
    (`interleaved`). by_domain: sort the images of a slice by domain.
    """

    images: int
    batch_size: int
    sizes: InputSizes
    seed: int
    rank: int = 0
    ranks: int = 1
    shares: np.ndarray | None = None
    single_from: float = math.inf
    domains: np.ndarray | None = None
    by_domain: bool = False
    epoch: int = 0
    start_batch: int = 0

    def __post_init__(self) -> None:
        whole = f", all that the {self.images} images of the set allow," if self.images < self.batch_size else ""
        self.batch_size = min(self.batch_size, self.images)
        if self.batch_size % self.ranks:
            raise UserError(f"a batch of {self.batch_size} images{whole} is not divisible by the {self.ranks} ranks.")

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        rng = np.random.default_rng([self.seed, self.epoch, 0, _ORDER])
        drawn = rng.permutation(self.images) if self.shares is None else balanced_order(self.shares, rng)
        order = (drawn if self.domains is None else interleaved(drawn, self.domains, rng)).tolist()
        for batch in range(self.start_batch, len(self)):
            number = self.epoch * len(self) + batch
            hw, is_single = self.sizes.of_batch(self.seed, number), number >= self.single_from
            share = self.batch_size // self.ranks
            start = batch * self.batch_size + self.rank * share
            places: Sequence[int] = range(start, start + share)
            if self.by_domain and self.domains is not None:
                domains = self.domains
                places = sorted(places, key=lambda at: domains[order[at]])
            yield [SampleKey(self.epoch, at, order[at], hw, is_single) for at in places]


class Loader:
    """Iterable of one Batch per list of keys, the samples' in the dataset, made ahead of time by `workers` processes.

    A new iteration ends an older one. If CUDA is in use, the batches are in page-locked memory.
    """

    def __init__(self, dataset: Dataset[Sample], keys: TrainBatchSampler | list[list[EvalKey]], workers: int) -> None:
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
        """The processes that are running now."""
        return self._workers.pids if self._workers else []


class TrainLoader(Loader):
    """This rank's slices of the Batches of the epoch given to `set_epoch`, from its start batch on.

    The length is that of a whole epoch.
    """

    keys: TrainBatchSampler

    @property
    def batch_size(self) -> int:
        """Images of every batch, over all ranks: fewer than asked for if the set is smaller."""
        return self.keys.batch_size

    @property
    def smallest_hw(self) -> tuple[int, int]:
        return self.keys.sizes.smallest

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iteration yields. start_batch: batches of the epoch that a resumed run has done."""
        self.keys.epoch = epoch
        self.keys.start_batch = start_batch

    def close_mosaic(self, batch: float) -> None:
        """Make no mosaic, mixup or cutmix from this batch on, counted over all epochs."""
        self.keys.single_from = batch


def make_train_loader(
    image_set: ImageSet,
    sizes: InputSizes,
    *,
    batch_size: int,
    augment: AugmentOptions,
    seed: int,
    workers: int,
    rank: int = 0,
    ranks: int = 1,
    cache: str = "ram",
    balance: bool = False,
    by_domain: bool = False,
    is_apart: bool = False,
) -> TrainLoader:
    """Make the loader of a training.

    batch_size: over all ranks. cache: of decoded images, for `open_cache`. balance: show rare classes more often. Of a
    set with domains: by_domain sorts the images of a batch by it, is_apart joins and mixes those of one domain only.
    """
    shares = image_shares(image_set) if balance else None
    keys = TrainBatchSampler(
        len(image_set),
        batch_size=batch_size,
        sizes=sizes,
        seed=seed,
        rank=rank,
        ranks=ranks,
        shares=shares,
        domains=image_set.domains,
        by_domain=by_domain,
    )
    kept = open_cache(cache, image_set, longest_px=sizes.kept_px)
    images = ShrunkImages(image_set, longest_px=sizes.kept_px, cache=kept)
    return TrainLoader(TrainDataset(images, augment, seed, shares, is_apart=is_apart), keys, workers)


@dataclass(frozen=True, slots=True)
class InputLayout:
    """How evaluation lays a whole image into the network input. resize: one of geometry.RESIZES.

    rect: sort images by aspect ratio and cut each batch's input to what its letterboxed images take of `input_hw`, in
    steps of step_px: the same images with less grey around. Raises UserError unless they are letterboxed.
    """

    input_hw: tuple[int, int]
    letterbox: bool
    resize: str = "opencv"
    rect: bool = False
    step_px: int = 32

    def __post_init__(self) -> None:
        if self.rect and not self.letterbox:
            raise UserError("rectangular batches are for letterboxed images; these are stretched to fill the input.")


def make_eval_loader(
    image_set: ImageSet, layout: InputLayout, *, batch_size: int, workers: int, rank: int = 0, ranks: int = 1
) -> Loader:
    """Make a loader of each image once, in the order of the set unless layout.rect; the last batch may be smaller.

    Of several ranks each takes every `ranks`-th image, from `rank` on: none if there are fewer images.
    """
    images = np.arange(rank, len(image_set), ranks)
    if layout.rect:
        height, width = image_set.hws[images].T
        images = images[np.argsort(height / width, kind="stable")]
    keys = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        hw = layout.input_hw
        if layout.rect:
            hw = rect_hw(image_set.hws[batch], layout.input_hw, layout.step_px)
        keys.append([EvalKey(image, hw) for image in batch.tolist()])
    return Loader(EvalDataset(image_set, letterbox=layout.letterbox, resize=layout.resize), keys, workers)


def rect_hw(hws: np.ndarray, input_hw: tuple[int, int], step_px: int) -> tuple[int, int]:
    """Return the smallest input, in steps of step_px, that shows letterboxed images (N, 2) as large as `input_hw`."""
    placements = [whole_placement((h, w), input_hw, letterbox=True) for h, w in hws.tolist()]
    inner = np.array([placement.image_px[::-1] for placement in placements]).max(axis=0)
    steps = np.ceil(np.round(inner) / step_px).astype(int)
    height, width = np.minimum(step_px * steps, input_hw).tolist()
    return height, width


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate Samples of one size; images (N, 3, H, W) RGB keep the samples' type. Samples may have no objects."""
    images = np.stack([sample.image for sample in samples]).transpose(0, 3, 1, 2)
    image_index = np.repeat(np.arange(len(samples)), [len(sample.labels) for sample in samples])
    return Batch(
        images=torch.from_numpy(np.ascontiguousarray(images)),
        targets=Targets(
            boxes=torch.from_numpy(np.concatenate([sample.boxes for sample in samples])),
            labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
            image_index=torch.from_numpy(image_index),
            is_crowd=torch.from_numpy(np.concatenate([sample.is_crowd for sample in samples])),
        ),
        image_ids=tuple(sample.image_id for sample in samples),
        paths=tuple(sample.path for sample in samples),
        placements=tuple(sample.placement for sample in samples),
        domains=tuple(sample.domain for sample in samples),
    )


def _batch_of(dataset: Dataset[Sample], keys: Sequence[Any]) -> Batch:
    return collate([dataset[key] for key in keys])


def _pinned(batches: Generator[Batch, None, None]) -> Iterator[Batch]:
    """Copy the batches to page-locked memory, in a thread that is one batch ahead."""
    device = torch.cuda.current_device()  # otherwise the thread of every rank would initialize the first GPU
    source = (batch.pin_memory() for batch in batches)
    with closing(batches), ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        ahead = thread.submit(next, source, None)
        while (batch := ahead.result()) is not None:
            ahead = thread.submit(next, source, None)
            yield batch
