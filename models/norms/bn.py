"""Batch norm (Ioffe & Szegedy 2015): `nn.BatchNorm2d` itself is the baseline, and two of its relatives.

- `PooledBatchNorm` differs in its running statistics only: they pool first and second moments over each batch,
  where the stock ones average the variances within mini-batches and miss the variance between them.
- `FrozenBatchNorm` always uses its running statistics and never changes them (detectron2's FrozenBN, whose eps
  is inside the root here, and which keeps trainable affine parameters).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.moments import Moments


class PooledBatchNorm(BatchStatNorm):
    """Each mini-batch normalized by its own moments; with `sync` those of all ranks (SyncBN).

    nn.SyncBatchNorm does the same but refuses CPU tensors, so that no test without a GPU could run it.
    """

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        return self.by_own_moments(y, own)


class FrozenBatchNorm(nn.BatchNorm2d):
    def forward(self, y: Tensor) -> Tensor:
        return F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
