"""CBN, cross-iteration batch normalization (Yao et al., CVPR 2021): a window of past mini-batches.

Past statistics were made with other weights, so they are compensated to today's. With y = W . P and P a patch,
mean_i(W) = W . mean(P)_i is exact and needs no old weights. The second moment is estimated from D = cov(y, P),
which is C_i W_i with C_i the covariance of the patches (`ESTIMATORS`):

- `std`: sigma_i(W) = sigma_i * (D . W) / (D . W_i). By Cauchy-Schwarz it never exceeds the exact
  sqrt(W C_i W), is never negative once the dot product is clamped at 0, and is exact under rescaling.
- `taylor`: the paper's first-order step of E[y^2] (section 3.2), and as in the authors' code (mmdet/models/utils/
  CBN.py) a mini-batch whose variance comes out negative is left out, channel by channel.
- `none`: the past as it was ("naive CBN").

The gradient is the exact partial derivative, the past held constant (`share`); with `weights` it also flows into
the layer's own weights through the compensation, where the authors cut it; with `renorm` it is that of plain BN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.norms.batch_stat import BatchStatNorm
from models.norms.contract import ConvAware, ConvView
from models.norms.moments import Moments
from models.norms.normalize import Rest
from utils.clock import Tick

ESTIMATORS = ("std", "taylor", "none")
CBN_GRADIENTS = ("share", "weights", "renorm")


class WindowGrowth:
    """How many of the last mini-batches may be pooled: 1 before `burn_in_steps`, in the end all that are kept.

    With `growth_steps` their number rises linearly from 1 over so many steps after burn-in.
    """

    def __init__(self, *, burn_in_steps: int, growth_steps: int) -> None:
        self.burn_in_steps, self.growth_steps = burn_in_steps, growth_steps

    def reach(self, step: int, kept: int) -> int:
        past = step - self.burn_in_steps
        if past < 0:
            return 1
        return kept if past >= self.growth_steps else 1 + (kept - 1) * past // self.growth_steps


class CrossIterationBatchNorm(BatchStatNorm, ConvAware):
    """CBN over `window` mini-batches, the current one counted; 0 means as many as a batch has.

    The history is a ring of slots. The forward writes the slot of its own mini-batch, so that a second forward
    within a tick overwrites the same slot; an announcement moves on. It is allocated by announcements:
    (window, C, K) + (window, G, K) numbers, about window copies of the conv's weights. Within a batch the weights
    stand still, so that the past is compensated once per batch.
    """

    def __init__(
        self,
        channels: int,
        *,
        patch_shape: tuple[int, int],
        window: int,
        growth: WindowGrowth,
        positions: int,
        eps: float,
        momentum: float,
        estimator: str = "std",
        gradient: str = "share",
        sync: bool = False,
    ) -> None:
        assert estimator in ESTIMATORS and gradient in CBN_GRADIENTS
        assert gradient != "weights" or estimator != "none", "without compensation the past does not move with W"
        super().__init__(channels, eps=eps, momentum=momentum, sync=sync)
        self.patch_shape, self.window, self.growth = patch_shape, window, growth
        self.estimator, self.gradient, self.positions = estimator, gradient, positions
        self.weights_moved = False  # an optimizer step lies between the last mini-batch and this one
        self.register_buffer("slot", torch.zeros(1, dtype=torch.long), persistent=False)
        self.register_buffer("reach", torch.ones(()), persistent=False)
        # As measured: positions (window,), moments and covariance of y along the filter (window, C), mean patch
        # (window, G, K), covariance of y and patch (window, C, K); and `now`: the moments at today's weights.
        for name in ("ring_count", *_OF_A_CHANNEL, "ring_patch", "ring_cov"):
            self.register_buffer(name, torch.zeros(0), persistent=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        window = self.window or tick.count
        if len(self.ring_count) < window:  # at first, and where batches are cut finer from here on
            self._allocate(window)
        super().announce(tick)
        kept = len(self.ring_count)
        self.slot.add_(self.ring_count[self.slot] > 0).remainder_(kept)
        self.ring_count.index_fill_(0, self.slot, 0)
        self.reach.fill_(self.growth.reach(tick.step, min(kept, window)))  # batches may be cut coarser after a resume
        self.weights_moved = tick.index == 0

    def normalize(self, y: Tensor, own: Moments, pool: Moments, view: ConvView) -> Tensor:
        with torch.no_grad():
            self._look(y, own, view)
            count = self._trusted_count()
            window = _pool(count, self.now_mean, self.now_var)
        if self.gradient == "renorm":
            return self.by_own_moments_renormed(y, own, window)
        if self.gradient == "share":
            return self.by_moments(y, window)
        weight = view.weight  # not under no_grad: a centred one is made here, and its graph leads to the parameter
        return self.by_moments(y, window, rest=self._rest(weight, count, window, view))

    def _allocate(self, window: int) -> None:
        self.slot.zero_()
        self.ring_count.resize_(window).zero_()
        for name in _OF_A_CHANNEL:
            getattr(self, name).resize_(window, self.channels).zero_()
        if self.estimator != "none":
            groups, numbers = self.patch_shape
            self.ring_patch.resize_(window, groups, numbers).zero_()
            self._allocate_covariance(window, self.channels, numbers)

    def _allocate_covariance(self, window: int, channels: int, numbers: int) -> None:
        self.ring_cov.resize_(window, channels, numbers).zero_()

    def _look(self, y: Tensor, own: Moments, view: ConvView) -> None:
        """Write the slot of this mini-batch, and bring the others' moments to today's weights."""
        if self.estimator != "none":
            patch, cov, along = view.patches_with(y, own, positions=self.positions, sync=self.sync)
            for ring, value in ((self.ring_patch, patch), (self.ring_cov, cov), (self.ring_along, along)):
                ring.index_copy_(0, self.slot, value[None])
            if self.weights_moved:
                self._compensate(view)
        self._write_moments(own)

    def _write_moments(self, own: Moments) -> None:
        self.ring_count.index_copy_(0, self.slot, own.count.view(1))
        for ring in (self.ring_mean, self.now_mean):
            ring.index_copy_(0, self.slot, own.mean[None])
        for ring in (self.ring_var, self.now_var):
            ring.index_copy_(0, self.slot, own.var[None])

    def _compensate(self, view: ConvView) -> None:
        along = view.along_weight(self.ring_cov)
        self.now_mean.copy_(view.along_weight(self.ring_patch))
        if self.estimator == "std":
            self._extrapolate_deviations(along)
        else:
            # E[y^2](W) = 2 E[y P] . W - E[y^2], written in covariances so that nothing large cancels.
            step = self.now_mean - self.ring_mean
            self.now_var.copy_(self.ring_var + 2 * (along - self.ring_along) - step.square())

    def _extrapolate_deviations(self, along: Tensor) -> None:
        """now_var <- by the estimator `std`; along, (C,) or (window, C): D . W at today's weights."""
        self.now_var.copy_(self.ring_var * deviation_ratio(self.ring_along, along).square())

    def _trusted_count(self) -> Tensor:
        """(window, C) positions of each mini-batch that may be pooled; a negative variance counts for nothing."""
        window = len(self.ring_count)
        age = (self.slot - torch.arange(window, device=self.slot.device)).remainder(window)
        count = torch.where(age < self.reach, self.ring_count, 0)[:, None]
        return torch.where(self.now_var >= 0, count, 0)

    @torch.no_grad()
    def _rest(self, weight: Tensor, count: Tensor, window: Moments, view: ConvView) -> Rest:
        """The past's part of the window, and how it moves with the weights."""
        others = count.index_fill(0, self.slot, 0)
        past = _pool(others, self.now_mean, self.now_var)
        share = others / past.count.clamp(min=1)
        # Half of d var_i / dW is slope * cov_i - drift * patch_i.
        if self.estimator == "std":
            sigmas = (self.now_var.clamp(min=0) * self.ring_var).sqrt()
            slope, drift = torch.where(self.ring_along > 0, sigmas / self.ring_along, 0), 0
        else:
            slope, drift = torch.ones_like(share), self.now_mean - self.ring_mean
        patch = view.per_channel(self.ring_patch)
        return Rest(
            weight=weight,
            share=past.count / window.count,
            mean=past.mean,
            patch=torch.einsum("wc,wck->ck", share, patch),
            cov=torch.einsum("wc,wck->ck", share * slope, self.ring_cov)
            + torch.einsum("wc,wck->ck", share * (self.now_mean - past.mean - drift), patch),
        )


def deviation_ratio(then: Tensor, now: Tensor) -> Tensor:
    """D . W_i and D . W -> sigma_i(W) / sigma_i, the estimator `std`: never negative, 1 where D says nothing."""
    return torch.where(then > 0, now / then, 1).clamp(min=0)


_OF_A_CHANNEL = ("ring_mean", "ring_var", "ring_along", "now_mean", "now_var")


def _pool(count: Tensor, mean: Tensor, var: Tensor) -> Moments:
    """count, mean, var (window, C) -> the union's, (C,) each."""
    total = count.sum(0)
    share = count / total.clamp(min=1)
    pooled = (share * mean).sum(0)
    return Moments(count=total, mean=pooled, var=(share * (var + (mean - pooled).square())).sum(0))
