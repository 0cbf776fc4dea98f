"""MABN, moving-average batch norm (Yan et al., ICLR 2020, arXiv:2001.06838): statistics of the forward and of the
backward, averaged over past mini-batches.

Forward: y_hat = y / sqrt(Q + eps), with Q an average of second moments E[y^2] over mini-batches. No mean is taken out,
which is why it needs centralized weights. Backward: dy = (gamma g - y_hat q) / sqrt(Q + eps), with q the same average
of E[gamma g y_hat].

The paper averages over a window of 16 mini-batches and corrects by a ratio of averages after a warm-up. Here both are
exponential averages without bias from their start, measured in images: one setting means the same at every mini-batch
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.norms.batch_stat import BatchStatNorm
from models.norms.moments import Moments
from models.norms.spec import Cut, NormSpec
from utils.clock import Tick
from utils.knob import knob


class MovingAverageNorm(BatchStatNorm):
    """MABN over about `average_images` images. Running statistics: mean 0, and E[y^2] as the variance.

    An average is kept as a sum of values weighted by age and the sum of the weights. `past` reaches to the mini-batch
    before this one, `last` includes it; a second forward within a tick overwrites `last`.
    """

    fuses_activation = False

    past_square: Tensor  # (C,) E[y^2] of the forward
    past_square_weight: Tensor  # ()
    past_product: Tensor  # (C,) E[gamma g y_hat] of the backward
    past_product_weight: Tensor  # ()
    last_square: Tensor  # (C,)
    last_square_weight: Tensor  # ()
    last_product: Tensor  # (C,)
    last_product_weight: Tensor  # ()

    def __init__(self, channels: int, *, average_images: float, eps: float, momentum: float) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.keep_per_image = 1 - 1 / average_images
        self.register_buffer("past_square", torch.zeros(channels), persistent=False)
        self.register_buffer("past_square_weight", torch.zeros(()), persistent=False)
        self.register_buffer("past_product", torch.zeros(channels), persistent=False)
        self.register_buffer("past_product_weight", torch.zeros(()), persistent=False)
        self.register_buffer("last_square", torch.zeros(channels), persistent=False)
        self.register_buffer("last_square_weight", torch.zeros(()), persistent=False)
        self.register_buffer("last_product", torch.zeros(channels), persistent=False)
        self.register_buffer("last_product_weight", torch.zeros(()), persistent=False)

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        square = self.average_square(own, len(y))
        self.used_moments = torch.zeros_like(square), square.detach()
        return _NormalizeByAverages.apply(y, self.weight, self.bias, square, self)

    @torch.no_grad()
    def average_square(self, own: Moments, images: int) -> Tensor:
        """Return the (C,) average of E[y^2] with its past."""
        past, last = (self.past_square, self.past_square_weight), (self.last_square, self.last_square_weight)
        return self._average(_second_moment(own), images, past, last)

    @torch.no_grad()
    def average_product(self, product: Tensor, images: int) -> Tensor:
        """Return the (C,) average of E[gamma g y_hat] with its past."""
        past, last = (self.past_product, self.past_product_weight), (self.last_product, self.last_product_weight)
        return self._average(product, images, past, last)

    def _average(self, value: Tensor, images: int, past: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor]) -> Tensor:
        """Write `last` from `past` and `value`. NaN and Inf stay out: fp16 loss scaling overflows at times."""
        keep, finite = self.keep_per_image**images, value.isfinite().all()
        total, weight = last
        total.copy_(torch.where(finite, keep * past[0] + (1 - keep) * value, past[0]))
        weight.copy_(torch.where(finite, keep * past[1] + (1 - keep), past[1]))
        return total / weight

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        # Without a forward, or a backward, since the last announcement `last` still equals the past.
        self.past_square.copy_(self.last_square)
        self.past_square_weight.copy_(self.last_square_weight)
        self.past_product.copy_(self.last_product)
        self.past_product_weight.copy_(self.last_product_weight)
        super().announce(tick)

    @torch.no_grad()
    def loss_rescaled(self, factor: float) -> None:
        self.past_product.mul_(factor)
        self.last_product.mul_(factor)

    def as_running(self, moments: Moments) -> tuple[Tensor, Tensor]:
        used = self.as_used(moments)
        return used.mean, used.var  # a mean of squares has no bias to correct

    def as_used(self, moments: Moments) -> Moments:
        return Moments(count=moments.count, mean=torch.zeros_like(moments.mean), var=_second_moment(moments))


def _second_moment(moments: Moments) -> Tensor:
    return moments.var + moments.mean.square()


class _NormalizeByAverages(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, square: Tensor, norm: MovingAverageNorm
    ) -> Tensor:
        ctx.norm = norm
        rstd = torch.rsqrt(square + norm.eps)
        ctx.save_for_backward(y, gamma, rstd)
        return F.batch_norm(y, torch.zeros_like(square), square, gamma, beta, False, 0.0, norm.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, gamma, rstd = ctx.saved_tensors
        _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            g, y, gamma, None, None, torch.zeros_like(rstd), rstd, True, 0.0, [False, True, True]
        )
        positions = y.numel() // y.shape[1]
        scale = gamma.to(rstd.dtype) * rstd
        product = ctx.norm.average_product(gamma.to(rstd.dtype) * dgamma / positions, len(y))
        per_y = (-rstd.square() * product).view(1, -1, 1, 1).to(g.dtype)
        dx = torch.mul(y.to(g.dtype), per_y).addcmul_(g, scale.view(1, -1, 1, 1).to(g.dtype))
        return dx, dgamma, dbeta, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingAverageNormSpec(NormSpec):
    """MABN."""

    name = "mabn"
    summary = "moving averages of the forward's and the backward's statistics; filters centralized"
    source = (
        "after Yan et al. Towards Stabilizing Batch Statistics in Backward Propagation. ICLR 2020, arXiv:2001.06838"
    )
    centralizes_weights = True

    average_images: float = knob(16.0, "images that its statistics are averaged over", low=1)

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        return MovingAverageNorm(conv.out_channels, average_images=self.average_images, eps=eps, momentum=momentum)

    def images(self, cut: Cut, *, momentum: float) -> float:
        return self.average_images

    def values_per_statistic(self, channels: int, positions: int, *, mini_batch: int) -> None:
        return None


SPECS: tuple[type[NormSpec], ...] = (MovingAverageNormSpec,)
