"""CmBN, cross mini-batch normalisation: pool the statistics of mini-batches 1..t of the running batch.

Sources: YOLOv4 (Bochkovskiy et al. 2020, section 3.3, figure 4) for the forward; "the" backward does not exist,
so it is a named choice. Pixels weight the pool, so mini-batches of unequal size are pooled exactly.

- `share`: the exact partial derivative, the earlier mini-batches held constant (what autograd gives).
- `weights` (CmBN-W, ours): in addition the exact gradient of the pooled statistics to the layer's own weights
  through the earlier mini-batches. Inside a batch the weights are constant, so with P a patch and y = W . P
  the past mean moves with W as mean(P), and the past second moment as 2 mean(y P): numbers that fit in memory
  although the activations are gone. Then, as for true batch norm, the gradient is orthogonal to each filter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.norms.batch_stat import BatchStatNorm, NormalizeShare
from models.norms.contract import ConvAware, ConvView, per_channel
from models.norms.moments import Moments
from utils.clock import Tick


class CrossMiniBatchNorm(BatchStatNorm):
    """CmBN with the gradient `share`."""

    def normalize(self, y: Tensor, own: Moments) -> Tensor:
        past = self.past_of_batch()
        pooled = past.merged_with(own)
        alpha = past.share_of(own)
        return NormalizeShare.apply(y, self.weight, self.bias, pooled.mean, pooled.var, alpha, self.eps)


class CrossMiniBatchNormW(BatchStatNorm, ConvAware):
    """CmBN with the gradient `weights`.

    Keeps, over the earlier mini-batches of the batch, the mean patch (G, K) and the covariance of output and
    patch (C, K): about one copy of the conv's weights. They are allocated at the first announcement, so that
    models for inference and averages of models do without.
    """

    def __init__(self, channels: int, *, patch_shape: tuple[int, int], eps: float, momentum: float) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.patch_shape = patch_shape  # (G, K)
        self.more_to_come = False
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
        self.more_to_come = tick.index + 1 < tick.count

    def normalize(self, y: Tensor, own: Moments, view: ConvView) -> Tensor:
        if self.more_to_come:
            self._remember_patches(y, own, view)
        past = self.past_of_batch()
        pooled = past.merged_with(own)
        return NormalizeShare.apply(
            y,
            self.weight,
            self.bias,
            pooled.mean,
            pooled.var,
            past.share_of(own),
            self.eps,
            view.weight,
            past.mean,
            view.per_channel(self.past_patch),
            self.past_cov,
        )

    def _allocate(self) -> None:
        groups, numbers = self.patch_shape
        for name in ("past", "last"):
            for kind, rows in (("patch", groups), ("cov", self.channels)):
                buffer = getattr(self, f"{name}_{kind}")
                if buffer.numel() == 0:
                    buffer.resize_(rows, numbers).zero_()

    @torch.no_grad()
    def _remember_patches(self, y: Tensor, own: Moments, view: ConvView) -> None:
        self.last_cov.copy_(view.covariance(y, own))
        self.last_patch.copy_(view.mean_patch(own.mean.dtype))

    def _pool_patches(self) -> None:
        """past <- past and last: covariances pool like variances (Chan et al.), step by step product."""
        if self.last_count == 0:  # the mini-batch was announced but never forwarded
            return
        past, count = self.past_of_batch(), self.past_count + self.last_count
        share = self.last_count / count
        patch_step = self.last_patch - self.past_patch
        mean_step = (self.last_mean - past.mean)[:, None]
        spread = mean_step * per_channel(patch_step, self.channels)
        self.past_cov.lerp_(self.last_cov, share).add_(share * (1 - share) * spread)
        self.past_patch.add_(share * patch_step)
