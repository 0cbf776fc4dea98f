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


class NormalizeShare(Function):
    """y (N, C, H, W) normalised with given moments, of which y's own share is alpha.

    Where the rest of the moments depends on the conv's weights, and that gradient is wanted, `conv_weight` is
    the parameter, and per channel and number of a patch (C, K) `rest_patch` is d rest_mean / dW and `rest_cov`
    half of d rest_var / dW; rest_mean (C,).
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
        rest_mean: Tensor | None = None,
        rest_patch: Tensor | None = None,
        rest_cov: Tensor | None = None,
    ) -> Tensor:
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(y, gamma, mean, rstd, alpha, rest_mean, rest_patch, rest_cov)
        ctx.conv_weight_shape = None if conv_weight is None else conv_weight.shape
        return F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, gamma, mean, rstd, alpha, rest_mean, rest_patch, rest_cov = ctx.saved_tensors
        # Batch norm's own kernel with our moments gives dx for alpha = 1, and the sums we need anyway.
        dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            g, y, gamma, None, None, mean, rstd, True, 0.0, [True, True, True]
        )
        scale = gamma.to(rstd.dtype) * rstd
        # dx = alpha * (dx for alpha = 1) + (1 - alpha) * (dx for alpha = 0)
        constant_moments = ((1 - alpha) * scale).view(1, -1, 1, 1).to(dx.dtype)
        dx = torch.addcmul(dx.mul_(alpha.to(dx.dtype)), g, constant_moments)
        dweight = None
        if ctx.conv_weight_shape is not None:
            # var = mean(y^2) - mean^2, so half its derivative through the rest is the rest's mean of
            # (y - mean) * patch: its covariance, shifted from its own mean to the pooled one.
            to_half_var = -(1 - alpha) * scale * rstd * dgamma
            to_mean = -(1 - alpha) * scale * dbeta + to_half_var * (rest_mean - mean)
            dweight = torch.addcmul(to_mean[:, None] * rest_patch, to_half_var[:, None], rest_cov)
            dweight = dweight.view(ctx.conv_weight_shape)
        return dx, dgamma, dbeta, None, None, None, None, dweight, None, None, None


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
        """Normalise y (N, C, H, W), whose own moments are `own`, with the moments this norm believes in.

        Asked only when announced.
        """

    def forward(self, y: Tensor, *context: Any) -> Tensor:
        if not self.training:
            return F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        own = Moments.of(y)
        self._remember("last", own)
        if not self.announced:
            with torch.no_grad():
                self._update_running_as_bn(own)
            alpha = torch.ones_like(own.count)
            return NormalizeShare.apply(y, self.weight, self.bias, own.mean, own.var, alpha, self.eps)
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
