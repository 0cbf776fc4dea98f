"""Batch norm (Ioffe & Szegedy 2015): `nn.BatchNorm2d` itself, the baseline, and its closest relatives.

`PooledBatchNorm` differs in its running statistics only: they pool first and second moments over each batch, where
nn.BatchNorm2d averages the variances within mini-batches and misses the variance between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.moments import Moments
from models.norms.spec import NormSpec
from utils.knob import knob


class PooledBatchNorm(BatchStatNorm):
    """Batch norm with pooled running statistics; with `sync` over all ranks (SyncBN).

    nn.SyncBatchNorm computes the same but refuses CPU tensors, so no test without a GPU could run it.
    """

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        return self.by_own_moments(y, own)


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm by its running statistics, which never move (detectron2's FrozenBatchNorm2d).

    Unlike there, eps is inside the root, and the affine parameters are trained.
    """

    def forward(self, y: Tensor) -> Tensor:
        return F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchNormSpec(NormSpec):
    """nn.BatchNorm2d."""

    name = "bn"
    summary = "the mini-batch's statistics"
    source = "Ioffe, Szegedy. Batch Normalization. ICML 2015, arXiv:1502.03167"

    running: str = knob(
        "ema",
        "running statistics as nn.BatchNorm2d averages them, or pooled over each batch",
        choices=("ema", "pooled"),
    )

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        kind = PooledBatchNorm if self.running == "pooled" else nn.BatchNorm2d
        return kind(conv.out_channels, eps=eps, momentum=momentum)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncBatchNormSpec(NormSpec):
    """Batch norm over the ranks of a torchrun job."""

    name = "syncbn"
    summary = "the mini-batch's statistics, over all GPUs"
    source = "Peng et al. MegDet: A Large Mini-Batch Object Detector. CVPR 2018, arXiv:1711.07240"
    sync: ClassVar[bool] = True

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        return PooledBatchNorm(conv.out_channels, eps=eps, momentum=momentum, sync=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenBatchNormSpec(NormSpec):
    """Batch norm by the running statistics that `--weights` brings."""

    name = "frozen"
    summary = "running statistics, which never move"
    source = "He et al. Deep Residual Learning. CVPR 2016, arXiv:1512.03385, appendix A; detectron2's FrozenBatchNorm2d"
    has_batch_statistics = False

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        return FrozenBatchNorm(conv.out_channels, eps=eps)

    def values_per_statistic(self, channels: int, positions: int, *, mini_batch: int) -> None:
        return None


SPECS: tuple[type[NormSpec], ...] = (BatchNormSpec, SyncBatchNormSpec, FrozenBatchNormSpec)
