"""Batch-channel norm (Qiao et al. 2019, arXiv:1903.10520): batch norm, then group norm, each with gamma and beta.

In the paper's form for micro-batches, the batch norm normalizes by estimates of the statistics: running averages that
the mini-batch at hand has moved already. They are constants for the gradient.

Differences from the authors' code (github.com/joe-siyuan-qiao/Batch-Channel-Normalization): the estimates count a
batch's mini-batches as one population, once per batch; their variance is that of the mixture and unbiased, as all
running statistics here, where theirs is taken around the mean before; the rate is --norm-momentum, where theirs is set
by a schedule; and the group norm's gamma and beta are per channel, not per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.group_norm import GroupedSpec, largest_divisor
from models.norms.moments import Moments
from models.norms.spec import Cut, NormSpec


class BatchChannelNorm(BatchStatNorm):
    """Batch norm by estimated statistics, then the group norm `channel`.

    The estimates are the running statistics that there would be if the batch ended with this mini-batch. They start
    with 0 and 1 and have one rate from the beginning: the group norm mends the scale, and as constants the statistics
    of a few values would let gradients explode. Without announcements the batch norm is by the mini-batch's own
    statistics, which is the paper's form for large batches.
    """

    fuses_activation = False

    def __init__(self, channels: int, *, groups: int, eps: float, momentum: float) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.channel = nn.GroupNorm(largest_divisor(channels, at_most=groups), channels, eps=eps)

    def forward(self, y: Tensor) -> Tensor:
        return self.channel(super().forward(y))

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        with torch.no_grad():
            rate = self.rate_after(self.num_batches_tracked)
            before = Moments(count=1 - rate, mean=self.running_mean, var=self.running_var)
            mean, var = self.as_running(pool)
            estimate = before.merged_with(Moments(count=rate, mean=mean, var=var))
            self.used_moments = estimate.mean, estimate.var
        return F.batch_norm(y, estimate.mean, estimate.var, self.weight, self.bias, False, 0.0, self.eps)

    def rate_after(self, batches: Tensor) -> Tensor:
        return torch.full_like(self.running_mean[0], self.momentum)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchChannelNormSpec(GroupedSpec):
    """Batch-channel norm with estimated statistics of batches."""

    name = "bcn"
    summary = "running statistics, then those of groups of channels of each image"
    source = "Qiao et al. Micro-Batch Training with Batch-Channel Normalization. 2019, arXiv:1903.10520"

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        return BatchChannelNorm(conv.out_channels, **self.options, eps=eps, momentum=momentum)

    def images(self, cut: Cut, *, momentum: float) -> float:
        """Return the time constant of the running average; without momentum it averages all batches."""
        return cut.batch / max(momentum, 1e-3)


SPECS: tuple[type[NormSpec], ...] = (BatchChannelNormSpec,)
