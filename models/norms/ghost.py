"""Ghost batch norm (Hoffer et al. 2017, arXiv:1705.08741, algorithm 1): parts of a large mini-batch, each normalized by
its own statistics, keep the noise of a small one.

The paper averages the running statistics over the parts one by one, deviations and not variances. Here they are those
of all parts pooled, once per batch, as in every norm of this project.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.moments import Moments
from models.norms.spec import Cut, NormSpec
from utils.knob import knob


class GhostBatchNorm(BatchStatNorm):
    """Batch norm of every `size` images by themselves; the last part may be smaller, but never a single value."""

    def __init__(self, channels: int, *, size: int, eps: float, momentum: float) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.size = size

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        parts = torch.split(y, part_sizes(len(y), size=self.size, positions=y.shape[2] * y.shape[3]))
        if len(parts) == 1:
            return self.by_own_moments(y, own)
        return torch.cat([self.by_own_moments(part, Moments.of(part)) for part in parts])


def part_sizes(images: int, *, size: int, positions: int) -> list[int]:
    """Return the numbers of images in the parts of a mini-batch, of which none has a single value per channel.

    positions: of an image. Only a mini-batch that is a single value is a part with one.
    """
    if positions == 1:
        size = max(size, 2)
    whole, rest = divmod(images, size)
    sizes = [size] * whole + [rest] * (rest > 0)
    if len(sizes) > 1 and sizes[-1] * positions == 1:
        sizes[-2:] = [sum(sizes[-2:])]
    return sizes or [images]


@dataclass(frozen=True, kw_only=True, slots=True)
class GhostBatchNormSpec(NormSpec):
    """Ghost batch norm."""

    name = "ghost"
    summary = "the statistics of parts of the mini-batch"
    source = "Hoffer, Hubara, Soudry. Train longer, generalize better. NeurIPS 2017, arXiv:1705.08741"

    size: int = knob(16, "images in a part (the paper's batches of 4096 are cut into parts of 128)", low=1)

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        return GhostBatchNorm(conv.out_channels, **self.options, eps=eps, momentum=momentum)

    def images(self, cut: Cut, *, momentum: float) -> float:
        return min(self.size, cut.mini_batch)


SPECS: tuple[type[NormSpec], ...] = (GhostBatchNormSpec,)
