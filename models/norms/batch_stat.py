"""Batch-statistics norms: all they share, so that each subclass answers one question - which moments?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norms import across_ranks
from models.norms.contract import ActivationAware, PoolsMoments
from models.norms.moments import Moments
from models.norms.normalize import Past, normalize, renormalize
from utils.clock import BatchAware, Tick

_FUSED: dict[type[nn.Module], str] = {nn.Mish: "mish", nn.SiLU: "silu"}  # names in normalize.ACTIVATIONS


class BatchStatNorm(nn.Module, BatchAware, ActivationAware, PoolsMoments):
    """Owner of the affine parameters, running statistics, eval path, dtype policy and BN's state-dict keys.

    Without announcements it is `nn.BatchNorm2d`: each training forward updates the running statistics, unless
    `track_running_stats` is off. With announcements (`utils/clock.py`) it updates them once per batch, from the moments
    pooled over the batch's mini-batches. It averages first and second moments: an average of variances would miss the
    variance between batches.

    The first updates after construction average all batches so far, so that a short training does not end with
    traces of the initial 0 and 1. From batch 1/momentum on it is BN's exponential average.

    With `sync`, a mini-batch's moments are those of all ranks' parts of it.

    With `takes_stock_kernel` a mini-batch that its own moments normalize goes through `nn.BatchNorm2d`'s kernels,
    forward and backward: to the bit its output and gradients, where the norm's own kernels round otherwise.

    `activation`, a name in normalize.ACTIVATIONS, is applied to the output: fused, the two keep fewer activations.
    """

    fuses_activation = True

    # Method of the subclass: normalizes y (N, C, H, W) with the moments it chooses. Called as (y, own, pool) with the
    # mini-batch's moments and those of the batch's mini-batches so far, this one included; a ConvAware norm gets its
    # ConvView after them. Called only when announced.
    normalize: Callable[..., Tensor]

    weight: Tensor  # (C,) gamma
    bias: Tensor  # (C,) beta
    running_mean: Tensor  # (C,)
    running_var: Tensor  # (C,) unbiased
    num_batches_tracked: Tensor  # ()
    past_count: Tensor  # () positions in the earlier mini-batches of this batch
    past_mean: Tensor  # (C,)
    past_var: Tensor  # (C,)
    pool_count: Tensor  # () the same with the mini-batch at hand
    pool_mean: Tensor  # (C,)
    pool_var: Tensor  # (C,)

    def __init__(self, channels: int, *, eps: float, momentum: float, sync: bool = False) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum, self.sync = channels, eps, momentum, sync
        self.track_running_stats = True
        self.takes_stock_kernel = False
        self.activation: str | None = None
        self.used_moments = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        self.register_buffer("past_count", torch.zeros(()), persistent=False)
        self.register_buffer("past_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("past_var", torch.zeros(channels), persistent=False)
        self.register_buffer("pool_count", torch.zeros(()), persistent=False)
        self.register_buffer("pool_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("pool_var", torch.zeros(channels), persistent=False)
        self.announced = False
        self.is_first = True  # mini-batch of its batch: the pool holds nothing else

    def forward(self, y: Tensor, *context: Any) -> Tensor:
        if not self.training:
            z = F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return z if self.activation is None else getattr(F, self.activation)(z)
        own = Moments.of(y)
        if self.sync:
            own = across_ranks.pool_over_ranks(own)
        if not self.announced:
            if self.track_running_stats:
                self._update_running_as_bn(own)
            return self.by_own_moments(y, own)
        with torch.no_grad():
            member = self.as_member(own)
            pool = member if self.is_first else self.past_of_batch().merged_with(member)
            # In place: rebinding would leave DDP, CUDA graphs and aliases with the old storage.
            torch._foreach_copy_(self._pool_buffers(), [pool.count, pool.mean, pool.var])
        with torch.autocast(y.device.type, enabled=False):  # which would round products of statistics
            return self.normalize(y, own, pool, *context)

    def take_over(self, activation: nn.Module) -> bool:
        if self.fuses_activation:
            self.activation = _FUSED.get(type(activation))
        return self.activation is not None

    def by_moments(self, y: Tensor, moments: Moments, *, is_share: bool = True, past: Past | None = None) -> Tensor:
        """Normalize as `normalize.normalize` does, with this norm's affine parameters."""
        self.used_moments = moments.mean.detach(), moments.var.detach()  # their graph would hold the forward's memory
        return normalize(
            y,
            self.weight,
            self.bias,
            moments,
            eps=self.eps,
            is_share=is_share,
            past=past,
            across_ranks=self._is_parallel(),
            activation=self.activation,
        )

    def by_own_moments(self, y: Tensor, own: Moments) -> Tensor:
        """Plain batch norm. With `sync` a mini-batch's moments are those of all ranks, of which y is a share."""
        if self.takes_stock_kernel and not self.sync and self.activation is None:
            z = F.batch_norm(y, None, None, self.weight, self.bias, True, 0.0, self.eps)
        else:
            z = self.by_moments(y, own, is_share=self.sync)
        self.used_moments = None
        return z

    def by_own_moments_renormed(
        self, y: Tensor, own: Moments, target: Moments, *, r_max: Tensor | None = None, d_max: Tensor | None = None
    ) -> Tensor:
        """Normalize to the values that `target` gives, within limits, with plain batch norm's gradient (Ioffe 2017)."""
        with torch.no_grad():
            self.used_moments = target.mean, target.var
            sigma = torch.sqrt(target.var + self.eps)
            r = torch.sqrt(own.var + self.eps) / sigma
            d = (own.mean - target.mean) / sigma
            if r_max is not None and d_max is not None:
                r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
        return renormalize(
            y,
            self.weight,
            self.bias,
            own,
            r,
            d,
            eps=self.eps,
            across_ranks=self._is_parallel(),
            activation=self.activation,
        )

    def as_member(self, own: Moments) -> Moments:
        """Return a mini-batch's moments as they enter the pool."""
        return own

    def _is_parallel(self) -> bool:
        return self.sync and across_ranks.is_parallel()

    def past_of_batch(self) -> Moments:
        """Return the pooled moments of the batch's earlier mini-batches; empty without announcements."""
        return Moments(count=self.past_count, mean=self.past_mean, var=self.past_var)

    def pool_of_batch(self) -> Moments:
        """Return the pooled moments of the batch's mini-batches, the one that was forwarded last included."""
        return Moments(count=self.pool_count, mean=self.pool_mean, var=self.pool_var)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        self.announced, self.is_first = True, tick.index == 0
        if self.is_first:
            self._forget_batch()
        else:
            torch._foreach_copy_(self._past_buffers(), self._pool_buffers())

    @torch.no_grad()
    def batch_ended(self) -> None:
        self._update_running(self.pool_of_batch())
        self._forget_batch()
        self.announced = False

    def _forget_batch(self) -> None:
        torch._foreach_zero_([*self._past_buffers(), *self._pool_buffers()])

    def _past_buffers(self) -> list[Tensor]:
        return [self.past_count, self.past_mean, self.past_var]

    def _pool_buffers(self) -> list[Tensor]:
        return [self.pool_count, self.pool_mean, self.pool_var]

    def as_running(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Return mean and variance, (C,) each, as the running statistics hold them."""
        return moments.mean, unbiased(moments)

    def as_used(self, moments: Moments) -> Moments:
        """Return the part of a population's moments that normalizes it in inference."""
        return moments

    @torch.no_grad()
    def _update_running(self, batch: Moments) -> None:
        self._average_in(batch.count > 0, *self.as_running(batch))

    def _average_in(self, has_values: Tensor, mean: Tensor, var: Tensor) -> None:
        """Average a batch's moments in; a no-op where it has no values. Branch-free: a branch would sync the GPU."""
        self.num_batches_tracked.add_(has_values)
        batches = self.num_batches_tracked.clamp(min=1).to(self.running_mean.dtype)
        rate = self.rate_after(batches) * has_values
        step = mean - self.running_mean
        self.running_mean.add_(rate * step)
        self.running_var.lerp_(var, rate).add_(rate * (1 - rate) * step * step)

    def rate_after(self, batches: Tensor) -> Tensor:
        """Return the rate () at which the last of so many batches enters the running statistics."""
        return (1 / batches).clamp(min=self.momentum)

    @torch.no_grad()
    def _update_running_as_bn(self, own: Moments) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(own.mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased(own).to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}" + (", sync" if self.sync else "")


def unbiased(moments: Moments) -> Tensor:
    """Return the (C,) variance with N - 1 in the divisor, as running statistics hold it."""
    return moments.var * (moments.count / (moments.count - 1).clamp(min=1))
