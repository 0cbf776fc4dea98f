"""CmBN, cross mini-batch normalization: pool the statistics of mini-batches 1..t of the running batch.

The forward is YOLOv4's (Bochkovskiy et al. 2020, section 3.3, figure 4), pooled with weights N * H * W, so mini-batches
of unequal size are pooled exactly. The paper gives no backward, so the gradient is a choice, one of `GRADIENTS`:

- `share`: the exact partial derivative with the earlier mini-batches held constant, which is what autograd gives.
  docs/gradients.md, equation (1).
- `weights` (CmBN-W, ours): in addition the exact gradient to the layer's own weights through the earlier mini-batches'
  statistics. W is constant within a batch, so with y = W . P and P the patch under the filter, d mean / dW = E[P] and
  d E[y^2] / dW = 2 E[y P]: small enough to keep after the activations are freed. The gradient is then orthogonal to
  each filter, as true batch norm's is. Equation (2).
- `renorm`: pooled values with the mini-batch's own batch-norm gradient, as in batch renormalization.
- `darknet`: what darknet's `batch_normalize=2` computes on a GPU (convolutional_layer.c, commit 59596d7).

Carry-over (ours, with `weights`): without it the pool holds one mini-batch at first, then two. With it the previous
batch's statistics replace the n - t mini-batches that are still to come, with that weight, compensated for the current
weights as by CBN's `std`; they have a gradient to the layer's weights as the earlier mini-batches do. Equation (3). So
every mini-batch but the last sees a window of n. Memory: one more copy of the weights (CBN's ring: n).

C output channels, G groups, K numbers in a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.cbn import deviation_ratio
from models.norms.contract import ConvAware, ConvView
from models.norms.moments import Moments
from models.norms.normalize import Past, add_outer
from models.norms.spec import Cut, NormSpec, own_fields, patch_shape
from utils.clock import Tick
from utils.errors import UserError
from utils.knob import knob

GRADIENTS = ("weights", "share", "renorm", "darknet")


class CrossMiniBatchNorm(BatchStatNorm):
    """CmBN with the gradient `share`."""

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        return self.by_own_moments(y, pool) if self.is_first else self.by_moments(y, pool)


class CrossMiniBatchNormR(BatchStatNorm):
    """CmBN with the gradient `renorm`."""

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        return self.by_own_moments_renormed(y, own, pool)


class CrossMiniBatchNormW(BatchStatNorm, ConvAware):
    """CmBN with the gradient `weights`.

    From the batch's first mini-batch to its last it keeps the mean patch (G, K) and the covariance of output and patch
    (C, K), of the earlier mini-batches (past) and of those and this one (pool): two copies of the convolution's
    weights. They are no buffers, because nothing of them outlives the batch, and are rebound each mini-batch instead of
    copied into, to save a pass over memory.

    In the first `burn_in_steps` optimizer steps a mini-batch is normalized by its own statistics, as in batch norm.

    The covariance is taken from at least `positions` positions (0 = all) and scaled to the exact variance, so the
    gradient stays orthogonal to each filter, unless these positions hold hardly any of that variance.
    """

    past_patch: Tensor  # (G, K)
    past_cov: Tensor  # (C, K)
    pool_patch: Tensor  # (G, K)
    pool_cov: Tensor  # (C, K)

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
        self.is_final = True  # whether this is the batch's last mini-batch: no later one needs its patches
        self.past_patch = self.past_cov = self.pool_patch = self.pool_cov = torch.zeros(())

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        super().announce(tick)
        self.is_final = tick.index + 1 == tick.count
        self.burns_in = tick.step < self.burn_in_steps
        # If no forward ran since the last announcement, the pool equals the past: a no-op.
        self.past_patch, self.past_cov = self.pool_patch, self.pool_cov

    def _forget_batch(self) -> None:
        super()._forget_batch()
        groups, patch_len = self.patch_shape
        zero = self.past_mean.new_zeros(())
        self.past_patch = self.pool_patch = zero.expand(groups, patch_len)
        self.past_cov = self.pool_cov = zero.expand(self.channels, patch_len)

    def normalize(self, y: Tensor, own: Moments, pool: Moments, view: ConvView) -> Tensor:
        if self.burns_in:
            return self.by_own_moments(y, own)
        if not self.is_final:
            self._pool_patches(y, own, pool, view)
        if self.is_first:
            return self.by_own_moments(y, pool)
        earlier = self.past_of_batch()
        share = earlier.count / pool.count
        past = Past(
            weight=view.weight, bias=view.bias, share=share, mean=earlier.mean, patch=self.past_patch, cov=self.past_cov
        )
        return self.by_moments(y, pool, past=past)

    @torch.no_grad()
    def _pool_patches(self, y: Tensor, own: Moments, pool: Moments, view: ConvView) -> None:
        """Write pool_patch and pool_cov from the past and this mini-batch."""
        patch, cov, _ = view.patches_with(y, own, positions=self.positions, sync=self.sync)
        if not self.is_first:
            patch, cov = self._with_past(own.count / pool.count, own.mean, patch, cov)
        self.pool_patch, self.pool_cov = patch, cov

    def _with_past(self, share: Tensor, mean: Tensor, patch: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """Pool mean patch and covariance of the past with others, which hold `share` of the union.

        Covariances pool like variances (Chan et al. 1979). `cov` is overwritten.
        """
        delta = patch - self.past_patch
        cov = cov.lerp_(self.past_cov, 1 - share)
        add_outer(cov, share * (1 - share) * (mean - self.past_mean), delta)
        return self.past_patch + share * delta, cov


class CarriedCrossMiniBatchNorm(CrossMiniBatchNormW):
    """CmBN with the gradient `weights` and carry-over.

    It keeps the moments, mean patch and covariance of the previous batch: of all its mini-batches but the final one,
    whose patches are not measured. `last_` is that batch as measured, `now_` compensated for the current weights.
    """

    remaining: Tensor  # () mini-batches still to come in this batch
    last_count: Tensor  # () positions
    last_var: Tensor  # (C,)
    last_along: Tensor  # (C,) last_cov . W at the weights it was measured with
    last_patch: Tensor  # (G, K); empty before the first announcement, as is last_cov
    last_cov: Tensor  # (C, K)
    now_mean: Tensor  # (C,)
    now_var: Tensor  # (C,)
    slope: Tensor  # (C,) half of d now_var / dW is slope * last_cov

    def __init__(self, channels: int, **settings: Any) -> None:
        super().__init__(channels, **settings)
        self.register_buffer("remaining", torch.zeros(()), persistent=False)
        self.register_buffer("last_count", torch.zeros(()), persistent=False)
        self.register_buffer("last_var", torch.zeros(channels), persistent=False)
        self.register_buffer("last_along", torch.zeros(channels), persistent=False)
        self.register_buffer("last_patch", torch.zeros(0), persistent=False)
        self.register_buffer("last_cov", torch.zeros(0), persistent=False)
        self.register_buffer("now_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("now_var", torch.zeros(channels), persistent=False)
        self.register_buffer("slope", torch.zeros(channels), persistent=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        if not len(self.last_cov):
            groups, patch_len = self.patch_shape
            self.last_patch.resize_(groups, patch_len).zero_()
            self.last_cov.resize_(self.channels, patch_len).zero_()
        super().announce(tick)
        self.remaining.fill_(tick.count - 1 - tick.index)

    def normalize(self, y: Tensor, own: Moments, pool: Moments, view: ConvView) -> Tensor:
        if self.burns_in:
            return self.by_own_moments(y, own)
        if self.is_final:
            self._keep_batch(view)
            return super().normalize(y, own, pool, view)
        if self.is_first:
            self._compensate(view)
        moments, past = self._with_last_batch(own, view)
        self._pool_patches(y, own, pool, view)
        return self.by_moments(y, moments, past=past)

    @torch.no_grad()
    def _keep_batch(self, view: ConvView) -> None:
        self.last_count.copy_(self.past_count)
        self.last_var.copy_(self.past_var)
        self.last_patch.copy_(self.past_patch)
        self.last_cov.copy_(self.past_cov)
        self.last_along.copy_(view.along_weight(self.last_cov))

    @torch.no_grad()
    def _compensate(self, view: ConvView) -> None:
        """Write the batch before as this batch's weights would have made it, and how it moves with them."""
        ratio = deviation_ratio(self.last_along, view.along_weight(self.last_cov))
        self.now_mean.copy_(view.mean_output(self.last_patch))
        self.now_var.copy_(self.last_var * ratio.square())
        self.slope.copy_(torch.where(self.last_along > 0, self.last_var * ratio / self.last_along, 0))

    def _with_last_batch(self, own: Moments, view: ConvView) -> tuple[Moments, Past]:
        """Return the window's moments, and the part of them that is not this mini-batch's: equation (3)."""
        with torch.no_grad():
            earlier = self.past_of_batch()
            # It stands for mini-batches like this one: with multi-scale the last batch may have had another size.
            count = torch.where(self.last_count > 0, own.count * self.remaining, 0)
            last = Moments(count=count, mean=self.now_mean, var=self.now_var)
            others = earlier.merged_with(last)
            moments = others.merged_with(own)
            share = last.count / others.count.clamp(min=1)
            patch, cov = self._with_past(share, last.mean, self.last_patch, self.slope[:, None] * self.last_cov)
        share = others.count / moments.count
        past = Past(weight=view.weight, bias=view.bias, share=share, mean=others.mean, patch=patch, cov=cov)
        return moments, past


class DarknetCrossMiniBatchNorm(BatchStatNorm):
    """CmBN with the gradient `darknet`: every mini-batch weighs the same, whatever its size.

    The pool is m = mean of means, v = mean of E[y^2] N / (N - 1), var = v - m^2. The backward treats the mini-batch
    as the whole pool (alpha = 1). Running statistics move after every mini-batch, towards the pool so far.
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
        """Return `own` with darknet's variance and count 1: merging such moments is darknet's plain average."""
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
        """Do nothing: they moved after every mini-batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossMiniBatchNormSpec(NormSpec):
    """CmBN and its options."""

    name = "cmbn"
    summary = "statistics of the batch's mini-batches so far"
    source = "Bochkovskiy et al. YOLOv4. 2020, arXiv:2004.10934, figure 4; gradient `darknet`: AlexeyAB/darknet 59596d7"

    gradient: str = knob(
        "weights",
        "backward: weights = to the layer's weights through all pooled mini-batches (ours), share = autograd's, "
        "darknet = darknet's, renorm = plain BN's",
        choices=GRADIENTS,
    )
    carry: bool = knob(False, "the previous batch replaces the mini-batches still to come (ours; gradient=weights)")
    burn_in_steps: int | None = knob(
        None,
        "optimizer steps of plain batch norm at the start (gradient=weights; default 0; with carry 100, or a "
        "tenth of a shorter training)",
        low=0,
    )
    positions: int = knob(256, "positions a patch covariance is taken from; 0 = all (gradient=weights)", low=0)
    sync: bool = knob(False, "pool over the ranks of a torchrun job too (gradient=weights, share)")

    def __post_init__(self) -> None:
        used = {"weights": {"carry", "burn_in_steps", "positions", "sync"}, "share": {"sync"}}.get(self.gradient, set())
        typed = [f.name for f in own_fields(type(self)) if getattr(self, f.name) != f.default]
        if unused := [option for option in typed if option != "gradient" and option not in used]:
            raise UserError(f"--norm cmbn:gradient={self.gradient} does not use {' and '.join(unused)}")

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        channels = conv.out_channels
        if self.gradient == "weights":
            return (CarriedCrossMiniBatchNorm if self.carry else CrossMiniBatchNormW)(
                channels,
                patch_shape=patch_shape(conv),
                positions=self.positions,
                burn_in_steps=self.burn_in,
                sync=self.sync,
                eps=eps,
                momentum=momentum,
            )
        if self.gradient == "share":
            return CrossMiniBatchNorm(channels, eps=eps, momentum=momentum, sync=self.sync)
        kind = CrossMiniBatchNormR if self.gradient == "renorm" else DarknetCrossMiniBatchNorm
        return kind(channels, eps=eps, momentum=momentum)

    def images(self, cut: Cut, *, momentum: float) -> float:
        return cut.batch

    @property
    def default_momentum(self) -> float:
        return 0.01 if self.gradient == "darknet" else 0.1

    @property
    def usual_burn_in(self) -> int:
        return 100 if self.carry else 0

    @property
    def remark(self) -> str:
        if self.gradient != "weights":
            return ""
        return (
            "gradient through the layer's own weights (ours; the published one, darknet's, is cmbn:gradient=darknet, "
            "autograd's is cmbn:gradient=share)"
        )


SPECS: tuple[type[NormSpec], ...] = (CrossMiniBatchNormSpec,)
