"""Batch-statistics norms: what they all share, so that each answers one question - which moments?"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norms import ranks
from models.norms.moments import Moments
from models.norms.normalize import ACTIVATIONS, normalize, renormalize
from utils.clock import BatchAware, Tick


class BatchStatNorm(nn.Module, BatchAware):
    """Owns the affine parameters, running statistics, eval path, dtype policy and BN's state-dict keys.

    Never announced, it is `nn.BatchNorm2d`: each training forward updates the running statistics, unless
    `track_running_stats` is off. Announced, it updates them once per batch, from the moments pooled over the
    batch's mini-batches; and as an average of first and second moments, because an average of variances misses
    the variance between batches.

    The first updates after construction average all batches so far, so that short trainings do not end with
    traces of the initial 0 and 1; from batch 1/momentum on it is BN's exponential average.

    With `sync`, a mini-batch's own moments are those of all ranks' parts of it.

    `activation`, a name in normalize.ACTIVATIONS, is applied to the output: together they keep fewer activations.
    """

    fuses_activation = True

    def __init__(self, channels: int, *, eps: float, momentum: float, sync: bool = False) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum, self.sync = channels, eps, momentum, sync
        self.track_running_stats = True
        self.activation: str | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        for name in ("past", "pool"):  # earlier mini-batches of this batch; those and the one at hand
            self.register_buffer(f"{name}_count", torch.zeros(()), persistent=False)
            self.register_buffer(f"{name}_mean", torch.zeros(channels), persistent=False)
            self.register_buffer(f"{name}_var", torch.zeros(channels), persistent=False)
        self.announced = False
        self.is_first = True  # of the batch's mini-batches: all that is pooled is its own

    @abstractmethod
    def normalize(self, y: Tensor, own: Moments, pool: Moments, *context: Any) -> Tensor:
        """Normalize y (N, C, H, W) with the moments this norm believes in.

        own: of y. pool: of the batch's mini-batches so far, y included. Asked only when announced.
        """

    def forward(self, y: Tensor, *context: Any) -> Tensor:
        if not self.training:
            z = F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return z if self.activation is None else getattr(F, self.activation)(z)
        own = Moments.of(y)
        if self.sync:
            own = ranks.pooled(own)
        if not self.announced:
            if self.track_running_stats:
                self._update_running_as_bn(own)
            return self.by_own_moments(y, own)
        with torch.no_grad():
            member = self.as_member(own)
            pool = member if self.is_first else self.past_of_batch().merged_with(member)
            # In place: rebinding would leave DDP, CUDA graphs and aliases with the old storage.
            torch._foreach_copy_(self._buffers_of("pool"), [pool.count, pool.mean, pool.var])
        with torch.autocast(y.device.type, enabled=False):  # which would round products of statistics
            return self.normalize(y, own, pool, *context)

    def fuse(self, activation: str) -> bool:
        """Apply `activation` too from now on; False, and nothing changes, where that is not possible."""
        if not self.fuses_activation or activation not in ACTIVATIONS:
            return False
        self.activation = activation
        return True

    def by_moments(self, y: Tensor, moments: Moments, **gradient: Any) -> Tensor:
        """As normalize.normalize, with this norm's affine parameters."""
        return normalize(y, self.weight, self.bias, moments, **self._of_all_gradients(), **gradient)

    def by_own_moments(self, y: Tensor, own: Moments) -> Tensor:
        """Plain batch norm. With `sync` a mini-batch's own moments are of all ranks, of which y is a share."""
        return self.by_moments(y, own, is_share=self.sync)

    def by_own_moments_renormed(
        self, y: Tensor, own: Moments, target: Moments, *, r_max: Tensor | None = None, d_max: Tensor | None = None
    ) -> Tensor:
        """Values as by `target`, within the limits, and the gradient of plain batch norm (Ioffe 2017)."""
        with torch.no_grad():
            sigma = torch.sqrt(target.var + self.eps)
            r = torch.sqrt(own.var + self.eps) / sigma
            d = (own.mean - target.mean) / sigma
            if r_max is not None and d_max is not None:
                r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
        return renormalize(y, self.weight, self.bias, own, r, d, **self._of_all_gradients())

    def as_member(self, own: Moments) -> Moments:
        """A mini-batch's moments as they enter the pool."""
        return own

    def _of_all_gradients(self) -> dict[str, Any]:
        """What normalize and renormalize are told alike."""
        parallel = self.sync and ranks.is_parallel()
        return {"eps": self.eps, "activation": self.activation, "across_ranks": parallel}

    def past_of_batch(self) -> Moments:
        """The earlier mini-batches of the running batch, pooled; empty when not announced."""
        return Moments(count=self.past_count, mean=self.past_mean, var=self.past_var)

    def pool_of_batch(self) -> Moments:
        """The same with the mini-batch at hand, once that was forwarded."""
        return Moments(count=self.pool_count, mean=self.pool_mean, var=self.pool_var)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        self.announced, self.is_first = True, tick.index == 0
        if self.is_first:
            self._forget_batch()
        else:
            torch._foreach_copy_(self._buffers_of("past"), self._buffers_of("pool"))

    @torch.no_grad()
    def batch_ended(self) -> None:
        self._update_running(self.pool_of_batch())
        self._forget_batch()
        self.announced = False

    def _forget_batch(self) -> None:
        torch._foreach_zero_([*self._buffers_of("past"), *self._buffers_of("pool")])

    def _buffers_of(self, name: str) -> list[Tensor]:
        return [getattr(self, f"{name}_{what}") for what in ("count", "mean", "var")]

    def as_running(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """(C,) each: mean and variance as the running statistics hold them."""
        return moments.mean, unbiased(moments)

    def as_used(self, moments: Moments) -> Moments:
        """What of a population's moments normalizes it in inference."""
        return moments

    @torch.no_grad()
    def _update_running(self, batch: Moments) -> None:
        self._average_in(batch.count > 0, *self.as_running(batch))

    def _average_in(self, seen: Tensor, mean: Tensor, var: Tensor) -> None:
        """No change where nothing was seen; without a branch, for which a GPU would have to be waited for."""
        self.num_batches_tracked.add_(seen)
        batches = self.num_batches_tracked.clamp(min=1).to(self.running_mean.dtype)
        rate = (1 / batches).clamp(min=self.momentum) * seen
        step = mean - self.running_mean
        self.running_mean.add_(rate * step)
        self.running_var.lerp_(var, rate).add_(rate * (1 - rate) * step * step)

    @torch.no_grad()
    def _update_running_as_bn(self, own: Moments) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(own.mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased(own).to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}" + (", sync" if self.sync else "")


def unbiased(moments: Moments) -> Tensor:
    """(C,) variance with N - 1 in the divisor, as running statistics hold it."""
    return moments.var * (moments.count / (moments.count - 1).clamp(min=1))
