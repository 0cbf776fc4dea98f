"""CBN, cross-iteration batch normalization (Yao et al., CVPR 2021): pool a window of past mini-batches.

Past statistics were measured with other weights, so they are compensated for the current ones (docs/gradients.md,
equation 4). With y = W . P and P a patch, the past mean W . mean(P) is exact and needs no old weights. The variance is
estimated from D = cov(y, P), which is C_i W_i with C_i the covariance of the patches, by one of `ESTIMATORS`:

- `std` (ours): sigma_i(W) = sigma_i * (D . W) / (D . W_i). By Cauchy-Schwarz it never exceeds the exact
  sqrt(W C_i W); it is never negative once the dot product is clamped at 0; it is exact under rescaling.
- `taylor`: the paper's first-order step of E[y^2] (section 3.2). As in the authors' code (mmdet/models/utils/CBN.py) a
  mini-batch whose variance comes out negative is left out, channel by channel.
- `none`: the past as it was ("naive CBN" in the paper).

The gradient is one of `GRADIENTS`: `share` is the exact partial derivative with the past held constant, as the authors
have it; `weights` (ours) also flows into the layer's own weights through the compensation; `renorm` is plain BN's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.contract import ConvAware, ConvView
from models.norms.moments import Moments
from models.norms.normalize import Past
from models.norms.spec import Cut, NormSpec, burn_in_knob, patch_shape
from utils.clock import Tick
from utils.errors import UserError
from utils.knob import knob

ESTIMATORS = ("std", "taylor", "none")
GRADIENTS = ("weights", "share", "renorm")


class CrossIterationBatchNorm(BatchStatNorm, ConvAware):
    """CBN over `window` mini-batches, the current one included; 0 means as many as a batch has.

    In the first `burn_in_steps` optimizer steps a mini-batch is normalized by its own statistics only.

    The history is a ring of slots, "as measured", with the moments at the current weights ("now") beside it. A forward
    writes the slot of its own mini-batch, so a second forward within a tick overwrites the same slot; an announcement
    moves on to the next. Announcements allocate the ring: (window, C, K) + (window, G, K) numbers, about `window`
    copies of the convolution's weights. Within a batch the weights stand still: the past is compensated once per batch.
    """

    slot: Tensor  # (1,) of the current mini-batch
    reach: Tensor  # () mini-batches that may be pooled
    ring_count: Tensor  # (window,) positions; 0 for an empty slot
    ring_mean: Tensor  # (window, C)
    ring_var: Tensor  # (window, C)
    ring_along: Tensor  # (window, C) D . W_i
    ring_patch: Tensor  # (window, G, K) mean patch
    ring_cov: Tensor  # (window, C, K) D = cov(y, patch)
    now_mean: Tensor  # (window, C) compensated for the current weights
    now_var: Tensor  # (window, C)

    def __init__(
        self,
        channels: int,
        *,
        patch_shape: tuple[int, int],
        window: int,
        burn_in_steps: int,
        positions: int,
        eps: float,
        momentum: float,
        estimator: str = "std",
        gradient: str = "share",
        sync: bool = False,
    ) -> None:
        assert estimator in ESTIMATORS and gradient in GRADIENTS
        assert gradient != "weights" or estimator != "none", "without compensation the past does not move with W"
        super().__init__(channels, eps=eps, momentum=momentum, sync=sync)
        self.patch_shape, self.window, self.burn_in_steps = patch_shape, window, burn_in_steps
        self.estimator, self.gradient, self.positions = estimator, gradient, positions
        self.weights_moved = False  # an optimizer step lies between the last mini-batch and this one
        self.register_buffer("slot", torch.zeros(1, dtype=torch.long), persistent=False)
        self.register_buffer("reach", torch.ones(()), persistent=False)
        self.register_buffer("ring_count", torch.zeros(0), persistent=False)
        self.register_buffer("ring_mean", torch.zeros(0), persistent=False)
        self.register_buffer("ring_var", torch.zeros(0), persistent=False)
        self.register_buffer("ring_along", torch.zeros(0), persistent=False)
        self.register_buffer("now_mean", torch.zeros(0), persistent=False)
        self.register_buffer("now_var", torch.zeros(0), persistent=False)
        self.register_buffer("ring_patch", torch.zeros(0), persistent=False)
        self.register_buffer("ring_cov", torch.zeros(0), persistent=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        window = self.window or tick.count
        if len(self.ring_count) < window:  # at first, and when batches are cut finer from here on
            self._allocate(window)
        super().announce(tick)
        kept = len(self.ring_count)
        self.slot.add_(self.ring_count[self.slot] > 0).remainder_(kept)
        self.ring_count.index_fill_(0, self.slot, 0)
        # A resumed run may cut its batches coarser: then the ring keeps more than the window.
        self.reach.fill_(min(kept, window) if tick.step >= self.burn_in_steps else 1)
        self.weights_moved = tick.index == 0

    def normalize(self, y: Tensor, own: Moments, pool: Moments, view: ConvView) -> Tensor:
        with torch.no_grad():
            self._record(y, own, view)
            count = self._trusted_count()
            window = _pool(count, self.now_mean, self.now_var)
        if self.gradient == "renorm":
            return self.by_own_moments_renormed(y, own, window)
        if self.gradient == "share":
            return self.by_moments(y, window)
        weight = view.weight  # outside no_grad: a centralized weight's graph leads to the parameter
        return self.by_moments(y, window, past=self._past(weight, count, window, view))

    def _allocate(self, window: int) -> None:
        self.slot.zero_()
        self.ring_count.resize_(window).zero_()
        for buffer in (self.ring_mean, self.ring_var, self.ring_along, self.now_mean, self.now_var):
            buffer.resize_(window, self.channels).zero_()
        if self.estimator != "none":
            groups, patch_len = self.patch_shape
            self.ring_patch.resize_(window, groups, patch_len).zero_()
            self._allocate_covariance(window, self.channels, patch_len)

    def _allocate_covariance(self, window: int, channels: int, patch_len: int) -> None:
        self.ring_cov.resize_(window, channels, patch_len).zero_()

    def _record(self, y: Tensor, own: Moments, view: ConvView) -> None:
        """Store this mini-batch, and compensate the others for the current weights if these have moved."""
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
        """Write now_mean and now_var: equation (4)."""
        along = view.along_weight(self.ring_cov)
        self.now_mean.copy_(view.mean_output(self.ring_patch))
        if self.estimator == "std":
            self._extrapolate_deviations(along)
        else:
            # E[y^2](W) = 2 E[y P] . W - E[y^2], written in covariances so that nothing large cancels.
            step = self.now_mean - self.ring_mean
            self.now_var.copy_(self.ring_var + 2 * (along - self.ring_along) - step.square())

    def _extrapolate_deviations(self, along: Tensor) -> None:
        """Write now_var by the estimator `std`; along, (C,) or (window, C), is D . W at the current weights."""
        self.now_var.copy_(self.ring_var * deviation_ratio(self.ring_along, along).square())

    def _trusted_count(self) -> Tensor:
        """Return (window, C) the positions that may be pooled: none of a mini-batch with a negative variance."""
        window = len(self.ring_count)
        age = (self.slot - torch.arange(window, device=self.slot.device)).remainder(window)
        count = torch.where(age < self.reach, self.ring_count, 0)[:, None]
        return torch.where(self.now_var >= 0, count, 0)

    @torch.no_grad()
    def _past(self, weight: Tensor, count: Tensor, window: Moments, view: ConvView) -> Past:
        """Return the past's part of the window, and how it moves with the weights: equation (4) differentiated."""
        others = count.index_fill(0, self.slot, 0)
        past = _pool(others, self.now_mean, self.now_var)
        share = others / past.count.clamp(min=1)
        # Half of d var_i / dW is slope * cov_i - drift * patch_i.
        if self.estimator == "std":
            sigmas = (self.now_var.clamp(min=0) * self.ring_var).sqrt()
            slope: Tensor = torch.where(self.ring_along > 0, sigmas / self.ring_along, 0)
            drift: Tensor | int = 0
        else:
            slope, drift = torch.ones_like(share), self.now_mean - self.ring_mean
        patch = view.per_channel(self.ring_patch)
        return Past(
            weight=weight,
            bias=view.bias,
            share=past.count / window.count,
            mean=past.mean,
            patch=torch.einsum("wc,wck->ck", share, patch),
            cov=torch.einsum("wc,wck->ck", share * slope, self.ring_cov)
            + torch.einsum("wc,wck->ck", share * (self.now_mean - past.mean - drift), patch),
        )


def deviation_ratio(then: Tensor, now: Tensor) -> Tensor:
    """Return sigma_i(W) / sigma_i by the estimator `std` from D . W_i and D . W: never negative, 1 where D is empty."""
    return torch.where(then > 0, now / then, 1).clamp(min=0)


def _pool(count: Tensor, mean: Tensor, var: Tensor) -> Moments:
    """Pool count, mean, var (window, C) to the union's, (C,) each."""
    total = count.sum(0)
    share = count / total.clamp(min=1)
    pooled = (share * mean).sum(0)
    return Moments(count=total, mean=pooled, var=(share * (var + (mean - pooled).square())).sum(0))


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossIterationBatchNormSpec(NormSpec):
    """CBN and its options."""

    name = "cbn"
    summary = "statistics of the last 4 mini-batches, across optimizer steps"
    source = "Yao et al. Cross-Iteration Batch Normalization. CVPR 2021, arXiv:2002.05712"

    gradient: str = knob(
        "weights",
        "backward: weights = through the past to the layer's weights (ours), share = past constant (published), "
        "renorm = plain BN's",
        choices=GRADIENTS,
    )
    estimator: str = knob(
        "std", "how past variances are compensated (std, ours; taylor, the paper's)", choices=ESTIMATORS
    )
    window: int = knob(4, "mini-batches, the current one included; 0 = as many as a batch has", low=0)
    burn_in_steps: int | None = burn_in_knob()
    positions: int = knob(256, "positions a patch covariance is taken from; 0 = all", low=0)
    sync: bool = knob(False, "pool over the ranks of a torchrun job too")

    def __post_init__(self) -> None:
        if self.estimator == "none" and self.gradient == "weights":
            raise UserError(
                "--norm cbn:estimator=none compensates nothing that a gradient could flow through: write "
                "cbn:estimator=none,gradient=share"
            )

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        shape = patch_shape(conv)
        return CrossIterationBatchNorm(conv.out_channels, patch_shape=shape, **self.options, eps=eps, momentum=momentum)

    def images(self, cut: Cut, *, momentum: float) -> float:
        return cut.mini_batch * (self.window or cut.subdivisions)

    @property
    def remark(self) -> str:
        if self.gradient != "weights":
            return ""
        return (
            "gradient through the past to the layer's weights (ours; cbn:gradient=share,estimator=taylor as published)"
        )


SPECS: tuple[type[NormSpec], ...] = (CrossIterationBatchNormSpec,)
