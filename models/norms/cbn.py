"""CBN, cross-iteration batch normalisation (Yao et al., CVPR 2021): a window of past mini-batches.

Past statistics were made with other weights, so they are compensated to today's. With y = W . P and P a patch,
mean_i(W) = W . mean(P)_i is exact and needs no old weights. For the deviation we extrapolate sigma, not the
second moment as the paper does: with D = cov(y, P) = C_i W_i,

    sigma_i(W) = sigma_i * (D . W) / (D . W_i),

which by Cauchy-Schwarz never exceeds the exact sqrt(W C_i W), is never negative once the dot product is clamped
at 0 (the paper's Taylor step needs a mask), and is exact under rescaling of the filter.

The gradient is the exact partial derivative, the past held constant: alpha = n / sum of n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.norms.batch_stat import BatchStatNorm, NormalizeShare
from models.norms.contract import ConvAware, ConvView
from models.norms.moments import Moments
from utils.clock import Tick


class CrossIterationBatchNorm(BatchStatNorm, ConvAware):
    """CBN over `window` mini-batches (the current one counts), plain BN before `burn_in_steps`.

    The history is a ring of `window` slots. The forward writes the slot of its own mini-batch, so that a second
    forward within a tick overwrites the same slot; an announcement moves on. It is allocated at the first
    announcement: (window, C, K) + (window, G, K) numbers, about window copies of the conv's weights.
    """

    def __init__(
        self,
        channels: int,
        *,
        patch_shape: tuple[int, int],
        window: int,
        burn_in_steps: int,
        eps: float,
        momentum: float,
    ) -> None:
        if window < 1:
            raise ValueError(f"a window holds at least the current mini-batch, not {window}")
        super().__init__(channels, eps=eps, momentum=momentum)
        self.patch_shape, self.window, self.burn_in_steps = patch_shape, window, burn_in_steps
        self.register_buffer("slot", torch.zeros(1, dtype=torch.long), persistent=False)
        self.register_buffer("trusted", torch.zeros(()), persistent=False)  # 0 in burn-in, then 1
        self.register_buffer("ring_count", torch.zeros(window), persistent=False)
        self.register_buffer("ring_var", torch.zeros(window, channels), persistent=False)
        self.register_buffer("ring_patch", torch.zeros(0), persistent=False)
        self.register_buffer("ring_cov", torch.zeros(0), persistent=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        self._allocate()
        super().announce(tick)
        written = (self.ring_count[self.slot] > 0).long()
        self.slot.add_(written).remainder_(self.window)
        self.ring_count[self.slot] = 0
        self.trusted.fill_(float(tick.step >= self.burn_in_steps))

    def normalize(self, y: Tensor, own: Moments, view: ConvView) -> Tensor:
        with torch.no_grad():
            self._write_slot(y, own, view)
            pooled = self._pool(own, view)
            alpha = own.count / pooled.count
        return NormalizeShare.apply(y, self.weight, self.bias, pooled.mean, pooled.var, alpha, self.eps)

    def _allocate(self) -> None:
        if self.ring_cov.numel() == 0:
            groups, numbers = self.patch_shape
            self.ring_patch.resize_(self.window, groups, numbers).zero_()
            self.ring_cov.resize_(self.window, self.channels, numbers).zero_()

    def _write_slot(self, y: Tensor, own: Moments, view: ConvView) -> None:
        self.ring_count.index_copy_(0, self.slot, own.count.view(1))
        self.ring_var.index_copy_(0, self.slot, own.var[None])
        self.ring_cov.index_copy_(0, self.slot, view.covariance(y, own)[None])
        self.ring_patch.index_copy_(0, self.slot, view.mean_patch(own.mean.dtype)[None])

    def _pool(self, own: Moments, view: ConvView) -> Moments:
        """Own moments with those of the ring's other slots, brought to today's weights."""
        weight = view.weight.detach().flatten(1).to(own.mean.dtype)
        # cov(y, P) . W_i is the variance itself: the denominator of the ratio needs no storage.
        ratio = ((self.ring_cov * weight).sum(-1) / self.ring_var).clamp(min=0)
        var = self.ring_var * torch.where(self.ring_var > 0, ratio, 1).square()
        mean = (view.per_channel(self.ring_patch) * weight).sum(-1)
        count = self.ring_count * self.trusted
        count = count.index_copy(0, self.slot, own.count.view(1))
        mean = mean.index_copy(0, self.slot, own.mean[None])
        var = var.index_copy(0, self.slot, own.var[None])
        total = count.sum()
        share = (count / total)[:, None]
        pooled_mean = (share * mean).sum(0)
        pooled_var = (share * (var + (mean - pooled_mean).square())).sum(0)
        return Moments(count=total, mean=pooled_mean, var=pooled_var)
