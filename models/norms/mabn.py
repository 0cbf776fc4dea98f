"""MABN, moving-average batch norm (Yan et al., ICLR 2020, arXiv 2001.06838): statistics of forward and backward
averaged over past mini-batches.

Forward: y_hat = y / sqrt(Q + eps), Q an average of second moments E[y^2] over mini-batches; no mean is taken out,
which is why it wants centred weights. Backward: dy = (gamma g - y_hat q) / sqrt(Q + eps), q the same average of
E[gamma g y_hat].

The paper averages over a window of 16 mini-batches and corrects by a ratio of averages after a warm-up; here both
are exponential averages without bias from their start, measured in images, so that one setting means the same
at every mini-batch size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.norms.batch_stat import BatchStatNorm
from models.norms.moments import Moments
from utils.clock import Tick


class MovingAverageNorm(BatchStatNorm):
    """An average over about `average_images` images. Running statistics: mean 0, and E[y^2] as the variance."""

    fuses_activation = False

    def __init__(self, channels: int, *, average_images: float, eps: float, momentum: float) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.keep_per_image = 1 - 1 / average_images
        # Sums of values weighted by age, and of the weights alone; past: up to the mini-batch before this one.
        for name in ("past", "last"):
            for what in ("square", "product"):  # E[y^2] of the forward, E[gamma g y_hat] of the backward
                self.register_buffer(f"{name}_{what}", torch.zeros(channels), persistent=False)
                self.register_buffer(f"{name}_{what}_weight", torch.zeros(()), persistent=False)

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        square = self.averaged("square", _second_moment(own), len(y))
        return _NormalizeByAverages.apply(y, self.weight, self.bias, square, self)

    @torch.no_grad()
    def averaged(self, what: str, value: Tensor, images: int) -> Tensor:
        """(C,) average of `value` with its past. Asked twice within a tick, the second value replaces the first.

        A value that is not finite is not remembered: float16's loss scaling finds its scale by overflows.
        """
        keep, finite = self.keep_per_image**images, value.isfinite().all()
        total, weight = getattr(self, f"last_{what}"), getattr(self, f"last_{what}_weight")
        past, past_weight = getattr(self, f"past_{what}"), getattr(self, f"past_{what}_weight")
        total.copy_(torch.where(finite, keep * past + (1 - keep) * value, past))
        weight.copy_(torch.where(finite, keep * past_weight + (1 - keep), past_weight))
        return total / weight

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        self._move_on()
        super().announce(tick)

    @torch.no_grad()
    def loss_rescaled(self, factor: float) -> None:
        for name in ("past", "last"):
            getattr(self, f"{name}_product").mul_(factor)

    def as_running(self, moments: Moments) -> tuple[Tensor, Tensor]:
        used = self.as_used(moments)
        return used.mean, used.var  # a mean of squares is without bias as it is

    def as_used(self, moments: Moments) -> Moments:
        return Moments(count=moments.count, mean=torch.zeros_like(moments.mean), var=_second_moment(moments))

    def _move_on(self) -> None:
        for what in ("square", "square_weight", "product", "product_weight"):
            past, last = getattr(self, f"past_{what}"), getattr(self, f"last_{what}")
            # Without a forward, or a backward, since the last announcement `last` still is the past.
            past.copy_(last)


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
        product = ctx.norm.averaged("product", gamma.to(rstd.dtype) * dgamma / positions, len(y))
        of_y = (-rstd.square() * product).view(1, -1, 1, 1).to(g.dtype)
        dx = torch.mul(y.to(g.dtype), of_y).addcmul_(g, scale.view(1, -1, 1, 1).to(g.dtype))
        return dx, dgamma, dbeta, None, None
