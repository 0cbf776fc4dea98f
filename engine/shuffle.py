"""Shuffle-BN: images of each mini-batch change ranks, so that batch statistics are not those of one video or place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from models.network import Network
from models.transfer import to_device_async
from models.yolo.head import RawHead
from utils import ranks
from utils.clock import BatchAware, Tick, announce_to, end_batch_of, listeners_of

_SHUFFLE = 3  # the last entry of a seed: none of the numbers that the loader draws


class ShuffledForward(nn.Module, BatchAware):
    """The network on images that were shuffled among ranks: (N, 3, H, W) -> the heads of the same images.

    Every rank has as many images in a mini-batch, before and after. Where each image goes depends on the seed, the
    optimizer step and the mini-batch's index only. Gradients take the heads' way back. Source: Wu & Johnson 2021,
    section 6; He et al. 2020, section 3.3. A collective.
    """

    def __init__(self, network: Network, seed: int) -> None:
        super().__init__()
        self.network = network
        self._seed = seed
        self._tick = Tick(step=0, index=0, count=1)
        self._listeners = listeners_of(network)

    def announce(self, tick: Tick) -> None:
        self._tick = tick
        announce_to(self._listeners, tick)

    def batch_ended(self) -> None:
        end_batch_of(self._listeners)

    def forward(self, images: Tensor) -> tuple[RawHead, ...]:
        goes_to = self._new_ranks(len(images))
        mine = goes_to[ranks.rank()]
        sent = np.bincount(mine, minlength=len(goes_to)).tolist()
        received = (goes_to == ranks.rank()).sum(axis=1).tolist()
        order = torch.from_numpy(mine.argsort(kind="stable"))
        there = ranks.all_to_all(images[to_device_async(order, images)], sent=sent, received=received)
        heads = self.network(there)
        # One message: those of several heads could cross in the backward.
        logits = torch.cat([head.logits.flatten(1) for head in heads], dim=1)
        logits = ranks.all_to_all(logits, sent=received, received=sent)[to_device_async(order.argsort(), images)]
        parts = torch.split(logits, [head.logits[0].numel() for head in heads], dim=1)
        return tuple(
            replace(head, logits=part.view(head.logits.shape)) for head, part in zip(heads, parts, strict=True)
        )

    def _new_ranks(self, images: int) -> np.ndarray:
        """Return (ranks, images): the rank that each image of each rank goes to, the same on all ranks."""
        rng = np.random.default_rng([self._seed, self._tick.step, self._tick.index, _SHUFFLE])
        world_size = ranks.world_size()
        return rng.permutation(np.repeat(np.arange(world_size), images)).reshape(world_size, images)
