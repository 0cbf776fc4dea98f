"""CmBN, cross mini-batch normalization: pool the statistics of mini-batches 1..t of the running batch.

Sources: YOLOv4 (Bochkovskiy et al. 2020, section 3.3, figure 4) for the forward; "the" backward does not exist,
so it is a named choice. Pixels weight the pool, so mini-batches of unequal size are pooled exactly.

- `share`: the exact partial derivative, the earlier mini-batches held constant (what autograd gives).
- `weights` (CmBN-W, ours): in addition the exact gradient of the pooled statistics to the layer's own weights
  through the earlier mini-batches. Inside a batch the weights are constant, so with P a patch and y = W . P
  the past mean moves with W as mean(P), and the past second moment as 2 mean(y P): numbers that fit in memory
  although the activations are gone. Then, as for true batch norm, the gradient is orthogonal to each filter.
- `renorm`: pooled values with the mini-batch's own batch-norm gradient, as batch renormalization does it.
- `darknet`: what `batch_normalize=2` computes there on a GPU (convolutional_layer.c, commit 59596d7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.norms.batch_stat import BatchStatNorm
from models.norms.contract import ConvAware, ConvView
from models.norms.moments import Moments
from models.norms.normalize import Rest, add_outer
from utils.clock import Tick


class CrossMiniBatchNorm(BatchStatNorm):
    """CmBN with the gradient `share`."""

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        return self.by_moments(y, pool, is_share=self.sync or not self.is_first)


class CrossMiniBatchNormR(BatchStatNorm):
    """CmBN with the gradient `renorm`."""

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        return self.by_own_moments_renormed(y, own, pool)


class CrossMiniBatchNormW(BatchStatNorm, ConvAware):
    """CmBN with the gradient `weights`.

    Keeps, of the earlier mini-batches of the batch and of the one at hand, the mean patch (G, K) and the covariance
    of output and patch (C, K): two copies of the conv's weights, from the batch's first mini-batch to its last.
    They are no buffers, as nothing of them outlives the batch, and are bound anew rather than written over, which
    spares passes over memory.

    In the first `burn_in_steps` optimizer steps a mini-batch is normalized by its own statistics, as in batch norm.

    The covariance is taken from at least `positions` positions (0 = all) and scaled to the exact variance, so that
    the gradient is orthogonal to each filter all the same, unless the grid sees hardly any of that variance.
    """

    def __init__(
        self,
        channels: int,
        *,
        patch_shape: tuple[int, int],
        positions: int,
        eps: float,
        momentum: float,
        burn_in_steps: int = 0,
        sync: bool = False,
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum, sync=sync)
        self.patch_shape, self.positions = patch_shape, positions  # patch_shape (G, K)
        self.burn_in_steps, self.burns_in = burn_in_steps, False
        self.is_last = True  # of the batch's mini-batches: no later one needs its patches
        self.past_patch = self.past_cov = self.pool_patch = self.pool_cov = torch.zeros(())

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        super().announce(tick)
        self.is_last = tick.index + 1 == tick.count
        self.burns_in = tick.step < self.burn_in_steps
        # Not forwarded since the last announcement, the pool is the past.
        self.past_patch, self.past_cov = self.pool_patch, self.pool_cov

    def _forget_batch(self) -> None:
        super()._forget_batch()
        groups, numbers = self.patch_shape
        zero = self.past_mean.new_zeros(())
        self.past_patch = self.pool_patch = zero.expand(groups, numbers)
        self.past_cov = self.pool_cov = zero.expand(self.channels, numbers)

    def normalize(self, y: Tensor, own: Moments, pool: Moments, view: ConvView) -> Tensor:
        if self.burns_in:
            return self.by_own_moments(y, own)
        if not self.is_last:
            self._pool_patches(y, own, pool, view)
        if self.is_first:
            return self.by_own_moments(y, pool)
        past = self.past_of_batch()
        share = past.count / pool.count
        rest = Rest(weight=view.weight, share=share, mean=past.mean, patch=self.past_patch, cov=self.past_cov)
        return self.by_moments(y, pool, rest=rest)

    @torch.no_grad()
    def _pool_patches(self, y: Tensor, own: Moments, pool: Moments, view: ConvView) -> None:
        """pool <- past and this mini-batch."""
        patch, cov, _ = view.patches_with(y, own, positions=self.positions, sync=self.sync)
        if not self.is_first:
            patch, cov = self._with_past(own.count / pool.count, own.mean, patch, cov)
        self.pool_patch, self.pool_cov = patch, cov

    def _with_past(self, share: Tensor, mean: Tensor, patch: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """Mean patch and covariance of the past and others, who have `share` of the union: covariances pool like
        variances (Chan et al.). `cov` is written over."""
        step = patch - self.past_patch
        cov = cov.lerp_(self.past_cov, 1 - share)
        add_outer(cov, share * (1 - share) * (mean - self.past_mean), step)
        return self.past_patch + share * step, cov


class DarknetCrossMiniBatchNorm(BatchStatNorm):
    """CmBN with the gradient `darknet`: every mini-batch weighs the same whatever its size.

    The pool is m = mean of means, v = mean of max(E[y^2] N / (N - 1), mean^2), var = v - m^2; the backward takes
    the mini-batch for all of it; running statistics move after every mini-batch, towards the pool so far.
    """

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        return self.by_moments(y, pool, is_share=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        if tick.index > 0:
            self._move_running()
        super().announce(tick)

    @torch.no_grad()
    def batch_ended(self) -> None:
        self._move_running()
        super().batch_ended()

    def as_member(self, own: Moments) -> Moments:
        """`own` with darknet's variance, counting as one. Chan's merge of such is darknet's average."""
        excess = (own.var + own.mean.square()) / (own.count - 1).clamp(min=1)
        return Moments(count=torch.ones_like(own.count), mean=own.mean, var=own.var + excess)

    def _move_running(self) -> None:
        so_far = self.pool_of_batch()
        forwarded = so_far.count > self.past_count
        self.num_batches_tracked.add_(forwarded)
        rate = self.momentum * forwarded.to(so_far.mean.dtype)
        self.running_mean.lerp_(so_far.mean, rate)
        self.running_var.lerp_(so_far.var, rate)

    def _update_running(self, batch: Moments) -> None:
        """Done after every mini-batch."""
