"""Batch-statistics norms: what they all share, so that each answers one question - which moments?

The gradient is that of normalising with pooled moments of which the mini-batch at hand holds the share alpha
(Ioffe & Szegedy 2015 with alpha = 1; alpha < 1 is the exact partial derivative when the rest is constant):

    dx = gamma * r * (g - alpha * (mean(g) + xhat * mean(g * xhat))),   r = 1 / sqrt(var + eps)
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.norms.moments import Moments
from utils.clock import BatchAware, Tick


def _column(per_channel: Tensor) -> Tensor:
    return per_channel.view(1, -1, 1, 1)


class NormalizeShare(Function):
    """y (N, C, H, W) normalised with given moments, of which y's own share is alpha.

    `weight_pull` (C, 2, K) with `conv_weight` (C, ...) is how the given mean and variance move with the conv's
    weights through everything but y: d mean / dW and half of d var / dW. None when nothing else moves.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        var: Tensor,
        alpha: Tensor,
        eps: float,
        conv_weight: Tensor | None = None,
        weight_pull: Tensor | None = None,
    ) -> Tensor:
        rstd = torch.rsqrt(var + eps)
        scale = gamma.to(rstd.dtype) * rstd
        shift = beta.to(rstd.dtype) - mean * scale
        ctx.save_for_backward(y, gamma, mean, rstd, alpha, weight_pull)
        ctx.conv_weight_shape = None if conv_weight is None else conv_weight.shape
        return torch.addcmul(_column(shift), y.to(scale.dtype), _column(scale)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, gamma, mean, rstd, alpha, weight_pull = ctx.saved_tensors
        positions = y.numel() // y.shape[1]
        g = g.to(rstd.dtype)
        centred = y.to(rstd.dtype) - _column(mean)
        sum_g = g.sum((0, 2, 3))
        sum_g_xhat = (g * centred).sum((0, 2, 3)) * rstd
        scale = gamma.to(rstd.dtype) * rstd
        # dx = scale * g - a - b * (y - mean)
        a = scale * alpha * sum_g / positions
        b = scale * rstd * alpha * sum_g_xhat / positions
        dx = torch.addcmul(g * _column(scale) - _column(a), centred, _column(b), value=-1)
        dweight = None
        if weight_pull is not None:
            to_mean = -scale * sum_g
            to_half_var = -scale * rstd * sum_g_xhat
            pull = to_mean[:, None] * weight_pull[:, 0] + to_half_var[:, None] * weight_pull[:, 1]
            dweight = pull.view(ctx.conv_weight_shape)
        return (
            dx.to(y.dtype),
            sum_g_xhat.to(gamma.dtype),
            sum_g.to(gamma.dtype),
            None,
            None,
            None,
            None,
            dweight,
            None,
        )


class BatchStatNorm(nn.Module, BatchAware):
    """Owns the affine parameters, running statistics, eval path, dtype policy and BN's state-dict keys.

    Never announced, it is `nn.BatchNorm2d`: each training forward updates the running statistics. Announced,
    it updates them once per batch, from the moments pooled over the batch's mini-batches; and as an average of
    first and second moments, because an average of variances misses the variance between batches.

    The first updates after construction average all batches so far, so that short trainings do not end with
    traces of the initial 0 and 1; from batch 1/momentum on it is BN's exponential average.
    """

    def __init__(self, channels: int, *, eps: float, momentum: float) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        for name in ("past", "last"):  # earlier mini-batches of this batch; the mini-batch at hand
            self.register_buffer(f"{name}_count", torch.zeros(()), persistent=False)
            self.register_buffer(f"{name}_mean", torch.zeros(channels), persistent=False)
            self.register_buffer(f"{name}_var", torch.zeros(channels), persistent=False)
        self.announced = False

    @abstractmethod
    def normalize(self, y: Tensor, own: Moments, *context: Any) -> Tensor:
        """Normalise y (N, C, H, W), whose own moments are `own`, with the moments this norm believes in."""

    def forward(self, y: Tensor, *context: Any) -> Tensor:
        if not self.training:
            return F.batch_norm(
                y, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        own = Moments.of(y)
        self._remember("last", own)
        if not self.announced:
            with torch.no_grad():
                self._update_running_as_bn(own)
        return self.normalize(y, own, *context)

    def past_of_batch(self) -> Moments:
        """The earlier mini-batches of the running batch, pooled; empty when not announced."""
        return Moments(count=self.past_count, mean=self.past_mean, var=self.past_var)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        if tick.index == 0:
            self._remember("past", self._empty())
        else:
            self._remember("past", self._batch_so_far())
        self._remember("last", self._empty())
        self.announced = True

    @torch.no_grad()
    def batch_ended(self) -> None:
        batch = self._batch_so_far()
        if batch.count > 0:
            self._update_running(batch)
        self._remember("past", self._empty())
        self._remember("last", self._empty())
        self.announced = False

    def _batch_so_far(self) -> Moments:
        last = Moments(count=self.last_count, mean=self.last_mean, var=self.last_var)
        return self.past_of_batch().merged_with(last)

    def _empty(self) -> Moments:
        zeros = torch.zeros_like(self.past_mean)
        return Moments(count=torch.zeros_like(self.past_count), mean=zeros, var=zeros)

    @torch.no_grad()
    def _remember(self, name: str, moments: Moments) -> None:
        # In place: rebinding would leave DDP, CUDA graphs and aliases with the old storage.
        getattr(self, f"{name}_count").copy_(moments.count)
        getattr(self, f"{name}_mean").copy_(moments.mean)
        getattr(self, f"{name}_var").copy_(moments.var)

    def _update_running(self, batch: Moments) -> None:
        self.num_batches_tracked.add_(1)
        rate = (1 / self.num_batches_tracked).clamp(min=self.momentum).to(self.running_mean.dtype)
        step = batch.mean - self.running_mean
        self.running_mean.add_(rate * step)
        self.running_var.lerp_(_unbiased(batch), rate).add_(rate * (1 - rate) * step * step)

    def _update_running_as_bn(self, own: Moments) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(own.mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(_unbiased(own).to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}"


def _unbiased(moments: Moments) -> Tensor:
    return moments.var * (moments.count / (moments.count - 1).clamp(min=1))
