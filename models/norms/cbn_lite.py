"""CBN-lite (ours): CBN whose mini-batches share one covariance of output and patch, measured every few steps.

CBN's memory and most of its time go into one such covariance D per mini-batch of the window. In the ratio
sigma_i(W) = sigma_i * (D . W) / (D . W_i) an older or newer D does almost as well. When a new one is measured,
the past is brought to today's weights with the old one and from then on counts as made today.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.norms.cbn import CrossIterationBatchNorm
from models.norms.contract import ConvView
from models.norms.moments import Moments
from utils.clock import Tick


class CrossIterationBatchNormLite(CrossIterationBatchNorm):
    """Holds one covariance (C, K) instead of `window`; it is measured anew every `refresh_steps` steps."""

    def __init__(self, channels: int, *, refresh_steps: int, **settings: Any) -> None:
        super().__init__(channels, **settings)
        self.refresh_steps = refresh_steps
        self.refresh = False
        self.register_buffer("shared_cov", torch.zeros(0), persistent=False)
        self.register_buffer("now_along", torch.zeros(0), persistent=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        super().announce(tick)
        self.refresh = tick.index == 0 and tick.step % self.refresh_steps == 0

    def _allocate_covariance(self, window: int, channels: int, numbers: int) -> None:
        self.shared_cov.resize_(channels, numbers).zero_()
        self.now_along.resize_(channels).zero_()

    def _look(self, y: Tensor, own: Moments, view: ConvView) -> None:
        if self.refresh:
            patch, cov, _ = view.patches_with(y, own, positions=self.positions, sync=self.sync)
        else:
            patch = view.pooled_mean_patch(y, own, sync=self.sync)
        self.ring_patch.index_copy_(0, self.slot, patch[None])
        if self.weights_moved:
            self.now_along.copy_(view.along_weight(self.shared_cov))
            self._extrapolate_deviations(self.now_along)
            self.now_mean.copy_(view.along_weight(self.ring_patch))
        if self.refresh:
            # Done twice, this changes nothing: the second time the ratio above is 1, to the bit, because both its
            # parts are dot products with the buffer and not with `cov`, whose memory layout may sum otherwise.
            self.ring_var.copy_(self.now_var)
            self.shared_cov.copy_(cov)
            self.now_along.copy_(view.along_weight(self.shared_cov))
            self.ring_along.copy_(self.now_along.expand_as(self.ring_along))
        self.ring_along.index_copy_(0, self.slot, self.now_along[None])
        self._write_moments(own)
