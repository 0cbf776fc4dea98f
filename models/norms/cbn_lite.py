"""CBN-lite (ours): CBN with one covariance of output and patch for the whole window, measured every few steps.

CBN spends its memory and most of its time on one such covariance D per mini-batch of the window. In the ratio
sigma_i(W) = sigma_i * (D . W) / (D . W_i) an older or newer D does almost as well. When a new one is measured, the past
is compensated with the old one and counts as measured at the current weights from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.norms.cbn import CrossIterationBatchNorm
from models.norms.contract import ConvView
from models.norms.moments import Moments
from models.norms.spec import Cut, NormSpec, burn_in_knob, patch_shape
from utils.clock import Tick
from utils.knob import knob


class CrossIterationBatchNormLite(CrossIterationBatchNorm):
    """CBN that holds one covariance (C, K) instead of `window`, and measures it every `refresh_steps` steps."""

    shared_cov: Tensor  # (C, K)
    now_along: Tensor  # (C,) shared_cov . W

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

    def _allocate_covariance(self, window: int, channels: int, patch_len: int) -> None:
        self.shared_cov.resize_(channels, patch_len).zero_()
        self.now_along.resize_(channels).zero_()

    def _record(self, y: Tensor, own: Moments, view: ConvView) -> None:
        cov = None
        if self.refresh:
            patch, cov, _ = view.patches_with(y, own, positions=self.positions, sync=self.sync)
        else:
            patch = view.pooled_mean_patch(y, own, sync=self.sync)
        self.ring_patch.index_copy_(0, self.slot, patch[None])
        if self.weights_moved:
            self.now_along.copy_(view.along_weight(self.shared_cov))
            self._extrapolate_deviations(self.now_along)
            self.now_mean.copy_(view.mean_output(self.ring_patch))
        if cov is not None:
            # A second forward changes nothing: its ratio above is 1 to the bit, because both parts are dot products
            # with the buffer, and not with `cov`, whose memory layout may sum in another order.
            self.ring_var.copy_(self.now_var)
            self.shared_cov.copy_(cov)
            self.now_along.copy_(view.along_weight(self.shared_cov))
            self.ring_along.copy_(self.now_along.expand_as(self.ring_along))
        self.ring_along.index_copy_(0, self.slot, self.now_along[None])
        self._write_moments(own)


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossIterationBatchNormLiteSpec(NormSpec):
    """CBN-lite and its options."""

    name = "cbn-lite"
    summary = "as cbn, compensated more coarsely"
    source = "ours, after Yao et al. 2021 (docs/norms.md)"

    # The gradient `weights` would need a covariance per mini-batch.
    gradient: str = knob("share", "past held constant (share), or BN's (renorm)", choices=("share", "renorm"))
    window: int = knob(4, "mini-batches, the current one included; 0 = as many as a batch has", low=0)
    burn_in_steps: int | None = burn_in_knob()
    refresh_steps: int = knob(4, "steps between two measurements of the patch covariance", low=1)
    positions: int = knob(256, "positions a patch covariance is taken from; 0 = all", low=0)
    sync: bool = knob(False, "pool over the ranks of a torchrun job too")

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        shape = patch_shape(conv)
        return CrossIterationBatchNormLite(
            conv.out_channels, patch_shape=shape, **self.options, eps=eps, momentum=momentum
        )

    def images(self, cut: Cut, *, momentum: float) -> float:
        return cut.mini_batch * (self.window or cut.subdivisions)


SPECS: tuple[type[NormSpec], ...] = (CrossIterationBatchNormLiteSpec,)
