"""CmBN-W with carry-over (ours): the last batch stands in for the mini-batches that are still to come.

CmBN's pool begins anew with each batch: its first mini-batch is normalized by nothing but itself, the second by two.
Here the batch before makes up the number: after t of n mini-batches it counts as n - t, brought to today's weights as
CBN's `std` does it, and moves with the layer's own weights as the earlier mini-batches of CmBN-W do. So every
mini-batch but the last sees a window of n, for one copy of the weights more, where CBN's ring takes n of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.norms.cbn import deviation_ratio
from models.norms.cmbn import CrossMiniBatchNormW
from models.norms.contract import ConvView
from models.norms.moments import Moments
from models.norms.normalize import Rest
from utils.clock import Tick


class CarriedCrossMiniBatchNorm(CrossMiniBatchNormW):
    """CmBN with the gradient `weights` and carry-over.

    Of each batch it keeps the moments, mean patch (G, K) and covariance of output and patch (C, K) of all mini-batches
    but the last, whose patches are never measured.
    """

    def __init__(self, channels: int, *, patch_shape: tuple[int, int], **settings: Any) -> None:
        super().__init__(channels, patch_shape=patch_shape, **settings)
        self.register_buffer("remaining", torch.zeros(()), persistent=False)  # mini-batches still to come
        self.register_buffer("last_count", torch.zeros(()), persistent=False)
        for name in ("var", "along"):
            self.register_buffer(f"last_{name}", torch.zeros(channels), persistent=False)
        for name in ("patch", "cov"):  # allocated by the first announcement: nothing else needs them
            self.register_buffer(f"last_{name}", torch.zeros(0), persistent=False)
        for name in ("now_mean", "now_var", "slope"):  # of the last batch, at the weights of this one
            self.register_buffer(name, torch.zeros(channels), persistent=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        if not len(self.last_cov):
            groups, numbers = self.patch_shape
            self.last_patch.resize_(groups, numbers).zero_()
            self.last_cov.resize_(self.channels, numbers).zero_()
        super().announce(tick)
        self.remaining.fill_(tick.count - 1 - tick.index)

    def normalize(self, y: Tensor, own: Moments, pool: Moments, view: ConvView) -> Tensor:
        if self.is_last and not self.burns_in:
            self._keep_batch(view)
        if self.is_last or self.burns_in:
            return super().normalize(y, own, pool, view)
        if self.is_first:
            self._bring_to_weights(view)
        moments, rest = self._with_last_batch(own, view)
        self._pool_patches(y, own, pool, view)
        return self.by_moments(y, moments, rest=rest)

    @torch.no_grad()
    def _keep_batch(self, view: ConvView) -> None:
        self.last_count.copy_(self.past_count)
        self.last_var.copy_(self.past_var)
        self.last_patch.copy_(self.past_patch)
        self.last_cov.copy_(self.past_cov)
        self.last_along.copy_(view.along_weight(self.last_cov))

    @torch.no_grad()
    def _bring_to_weights(self, view: ConvView) -> None:
        ratio = deviation_ratio(self.last_along, view.along_weight(self.last_cov))
        self.now_mean.copy_(view.along_weight(self.last_patch))
        self.now_var.copy_(self.last_var * ratio.square())
        self.slope.copy_(torch.where(self.last_along > 0, self.last_var * ratio / self.last_along, 0))

    def _with_last_batch(self, own: Moments, view: ConvView) -> tuple[Moments, Rest]:
        """The window's moments, and what of them is not this mini-batch."""
        with torch.no_grad():
            past = self.past_of_batch()
            # In place of mini-batches like this one: with multi-scale the last batch may have been of another size.
            count = torch.where(self.last_count > 0, own.count * self.remaining, 0)
            last = Moments(count=count, mean=self.now_mean, var=self.now_var)
            others = past.merged_with(last)
            moments = others.merged_with(own)
            share = last.count / others.count.clamp(min=1)
            patch, cov = self._with_past(share, last.mean, self.last_patch, self.slope[:, None] * self.last_cov)
        rest = Rest(weight=view.weight, share=others.count / moments.count, mean=others.mean, patch=patch, cov=cov)
        return moments, rest
