"""CmBN, cross mini-batch normalisation: pool the statistics of mini-batches 1..t of the running batch.

Sources: YOLOv4 (Bochkovskiy et al. 2020, section 3.3, figure 4) for the forward; "the" backward does not exist,
so it is a named choice. Pixels weight the pool, so mini-batches of unequal size are pooled exactly.

- `share`: the exact partial derivative, the earlier mini-batches held constant (what autograd gives).
- `weights` (CmBN-W, ours): in addition the exact gradient of the pooled statistics to the layer's own weights
  through the earlier mini-batches. Inside a batch the weights are constant, so with P a patch and y = W . P
  the past mean moves with W as mean(P), and the past second moment as 2 mean(y P): numbers that fit in memory
  although the activations are gone. Then, as for true batch norm, the gradient is orthogonal to each filter.
- `renorm`: pooled values with the mini-batch's own batch-norm gradient, as batch renormalisation does it.
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

    def normalize(self, y: Tensor, own: Moments) -> Tensor:
        if self.is_first:
            return self.by_moments(y, own, is_share=self.sync)
        return self.by_moments(y, self.past_of_batch().merged_with(own))


class CrossMiniBatchNormR(BatchStatNorm):
    """CmBN with the gradient `renorm`."""

    def normalize(self, y: Tensor, own: Moments) -> Tensor:
        return self.by_own_moments_renormed(y, own, self.past_of_batch().merged_with(own))


class CrossMiniBatchNormW(BatchStatNorm, ConvAware):
    """CmBN with the gradient `weights`.

    Keeps, of the earlier mini-batches of the batch and of the one at hand, the mean patch (G, K) and the covariance
    of output and patch (C, K): two copies of the conv's weights. They are allocated at the first announcement, so
    that models for inference and averages of models do without.

    The covariance is taken from at least `positions` positions (0 = all) and scaled to the exact variance, so that
    the gradient is orthogonal to each filter all the same.
    """

    def __init__(
        self,
        channels: int,
        *,
        patch_shape: tuple[int, int],
        positions: int,
        eps: float,
        momentum: float,
        sync: bool = False,
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum, sync=sync)
        self.patch_shape, self.positions = patch_shape, positions  # patch_shape (G, K)
        self.is_last = True  # of the batch's mini-batches: nothing needs its patches
        for name in ("past", "last"):
            self.register_buffer(f"{name}_patch", torch.zeros(0), persistent=False)
            self.register_buffer(f"{name}_cov", torch.zeros(0), persistent=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        self._allocate()
        if tick.index == 0:
            self.past_patch.zero_()
            self.past_cov.zero_()
        else:
            self._pool_patches()
        super().announce(tick)
        self.is_last = tick.index + 1 == tick.count

    def normalize(self, y: Tensor, own: Moments, view: ConvView) -> Tensor:
        if not self.is_last:
            self._remember_patches(y, own, view)
        if self.is_first:
            return self.by_moments(y, own, is_share=self.sync)
        past = self.past_of_batch()
        pooled = past.merged_with(own)
        rest = Rest(
            weight=view.weight,
            share=past.count / pooled.count,
            mean=past.mean,
            patch=self.past_patch,
            cov=self.past_cov,
        )
        return self.by_moments(y, pooled, rest=rest)

    def _allocate(self) -> None:
        groups, numbers = self.patch_shape
        for name in ("past", "last"):
            for kind, rows in (("patch", groups), ("cov", self.channels)):
                buffer = getattr(self, f"{name}_{kind}")
                if buffer.numel() == 0:
                    buffer.resize_(rows, numbers).zero_()

    @torch.no_grad()
    def _remember_patches(self, y: Tensor, own: Moments, view: ConvView) -> None:
        patch, cov, _ = view.patches_with(y, own, positions=self.positions, sync=self.sync)
        self.last_patch.copy_(patch)
        self.last_cov.copy_(cov)

    def _pool_patches(self) -> None:
        """past <- past and last: covariances pool like variances (Chan et al.), in as few passes as there can be."""
        past, last = self.past_of_batch(), self.last_of_batch()
        share = last.count / (past.count + last.count).clamp(min=1)  # 0: announced but never forwarded
        patch_step = self.last_patch - self.past_patch
        self.past_cov.lerp_(self.last_cov, share)
        add_outer(self.past_cov, share * (1 - share) * (last.mean - past.mean), patch_step)
        self.past_patch.add_(share * patch_step)


class DarknetCrossMiniBatchNorm(BatchStatNorm):
    """CmBN with the gradient `darknet`: every mini-batch weighs the same whatever its size.

    The pool is m = mean of means, v = mean of max(E[y^2] N / (N - 1), mean^2), var = v - m^2; the backward takes
    the mini-batch for all of it; running statistics move after every mini-batch, towards the pool so far.
    """

    def normalize(self, y: Tensor, own: Moments) -> Tensor:
        return self.by_moments(y, self.past_of_batch().merged_with(self._as_one(own)), is_share=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        if tick.index > 0:
            self._move_running()
        super().announce(tick)

    @torch.no_grad()
    def batch_ended(self) -> None:
        self._move_running()
        super().batch_ended()

    def last_of_batch(self) -> Moments:
        return self._as_one(super().last_of_batch())

    def _as_one(self, own: Moments) -> Moments:
        """`own` with darknet's variance, counting as one. Chan's merge of such is darknet's average."""
        excess = (own.var + own.mean.square()) / (own.count - 1).clamp(min=1)
        return Moments(count=(own.count > 0).to(own.count.dtype), mean=own.mean, var=own.var + excess)

    def _move_running(self) -> None:
        so_far, rate = self._batch_so_far(), self.momentum * (self.last_count > 0)
        self.num_batches_tracked.add_(self.last_count > 0)
        self.running_mean.lerp_(so_far.mean, rate)
        self.running_var.lerp_(so_far.var, rate)

    def _update_running(self, batch: Moments) -> None:
        """Done after every mini-batch."""
