"""The one forward and backward that batch-statistics norms share.

Normalized with moments of which the mini-batch at hand holds the share alpha (Ioffe & Szegedy 2015 with
alpha = 1; alpha < 1 is the exact partial derivative when the rest is constant):

    dx = gamma * r * (g - alpha * (mean(g) + xhat * mean(g * xhat))),   r = 1 / sqrt(var + eps)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.norms import ranks
from models.norms.moments import Moments

# Those whose autograd keeps their input; of the others in use it keeps the output, which is kept anyway.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "mish": (lambda z: F.mish(z, inplace=True), torch.ops.aten.mish_backward),
    "silu": (lambda z: F.silu(z, inplace=True), torch.ops.aten.silu_backward),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rest:
    """How the part of the moments that is not this mini-batch's depends on the convolution's weight.

    weight: the parameter, or what was made of it, attached. share, () or (C,): of the rest in the moments.
    mean (C,): the rest's. patch (G, K) or (C, K) is d mean / dW of the rest alone, cov (C, K) half of d var / dW.
    """

    weight: Tensor
    share: Tensor
    mean: Tensor
    patch: Tensor
    cov: Tensor


def normalize(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Moments,
    *,
    eps: float,
    is_share: bool = True,
    rest: Rest | None = None,
    across_ranks: bool = False,
    activation: str | None = None,
) -> Tensor:
    """y (N, C, H, W) normalized with `moments`.

    is_share: the gradient takes y for a share of the moments, or with False for all of them; the values do not change.
    moments.count may be () or (C,). With across_ranks, y is this rank's part of a mini-batch that all ranks hold, and
    what other ranks' losses say of its moments is added up.

    `activation`, one of ACTIVATIONS, is applied to what is returned. Its input is not kept but made again from y
    in the backward: of the three tensors that conv, norm and activation leave behind, two are enough.
    """
    alpha = (y.numel() // y.shape[1]) / moments.count if is_share else None
    parts = (rest.weight, rest.share, rest.mean, rest.patch, rest.cov) if rest is not None else (None,) * 5
    return _Normalize.apply(y, gamma, beta, moments.mean, moments.var, alpha, eps, across_ranks, activation, *parts)


def renormalize(
    y: Tensor, gamma: Tensor, beta: Tensor, own: Moments, r: Tensor, d: Tensor, *, across_ranks: bool, **others: Any
) -> Tensor:
    """gamma * (xhat * r + d) + beta with xhat by y's own moments and r, d (C,) constants (Ioffe 2017).

    across_ranks and the others as in `normalize`; a rank's part is a share of the mini-batch's own moments.
    """
    return normalize(y, gamma * r, beta + gamma * d, own, is_share=across_ranks, across_ranks=across_ranks, **others)


class _Normalize(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        var: Tensor,
        alpha: Tensor | None,
        eps: float,
        across_ranks: bool,
        activation: str | None,
        weight: Tensor | None,
        rest_share: Tensor | None,
        rest_mean: Tensor | None,
        rest_patch: Tensor | None,
        rest_cov: Tensor | None,
    ) -> Tensor:
        rstd = torch.rsqrt(var + eps)
        to_redo = (None, None) if activation is None else (beta, var)
        ctx.save_for_backward(y, gamma, mean, rstd, alpha, *to_redo, rest_share, rest_mean, rest_patch, rest_cov)
        ctx.across_ranks, ctx.activation, ctx.eps = across_ranks, activation, eps
        ctx.weight_shape = None if weight is None else weight.shape
        z = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
        return z if activation is None else ACTIVATIONS[activation][0](z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, gamma, mean, rstd, alpha, beta, var, rest_share, rest_mean, rest_patch, rest_cov = ctx.saved_tensors
        if ctx.activation is not None:
            z = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, ctx.eps)
            g = ACTIVATIONS[ctx.activation][1](g, z)
            del z
        scale = gamma.to(rstd.dtype) * rstd
        if ctx.across_ranks:
            dx, dgamma, dbeta = _backward_across_ranks(g, y, gamma, scale, mean, rstd, alpha)
        else:
            # Batch norm's own kernel with our moments gives dx for alpha = 1, and the sums we need anyway.
            # dx is linear in gamma and the sums do not depend on it, so that alpha goes in there for nothing.
            share_of_gamma = gamma if alpha is None else (gamma * alpha).to(gamma.dtype)
            dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
                g, y, share_of_gamma, None, None, mean, rstd, True, 0.0, [True, True, True]
            )
            if alpha is not None:  # the rest of dx: moments held constant
                dx.addcmul_(g, ((1 - alpha) * scale).view(1, -1, 1, 1).to(dx.dtype))
        dweight = None
        if ctx.weight_shape is not None:
            # var = mean(y^2) - mean^2, so half its derivative through the rest is the rest's mean of
            # (y - mean) * patch: its covariance, shifted from its own mean to the pooled one.
            to_half_var = -rest_share * scale * rstd * dgamma
            to_mean = -rest_share * scale * dbeta + to_half_var * (rest_mean - mean)
            # Not a view itself, so that autograd adds the convolution's own gradient to it in place.
            dweight = rest_cov.view(ctx.weight_shape) * to_half_var.view(-1, 1, 1, 1)
            add_outer(dweight.flatten(1), to_mean, rest_patch)
        return dx, dgamma, dbeta, *(None,) * 6, dweight, *(None,) * 4


def add_outer(to: Tensor, of_channel: Tensor, patch: Tensor) -> None:
    """to (C, K) += of_channel (C,) times patch (G, K) or (C, K), in place: each channel takes its group's row."""
    rows = patch.shape[0]
    if rows == 1:
        to.addr_(of_channel, patch[0])
    else:
        to.view(rows, -1, to.shape[1]).addcmul_(of_channel.view(rows, -1, 1), patch[:, None])


def _backward_across_ranks(
    g: Tensor, y: Tensor, gamma: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, alpha: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula above with sums over all ranks; dgamma and dbeta stay this rank's, whoever averages them."""
    assert alpha is not None, "across ranks a mini-batch is always a share"
    _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        g, y, gamma, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    sum_g_xhat, sum_g = ranks.summed(dgamma, dbeta)
    per_position = -scale * (alpha * y.shape[1] / y.numel())  # alpha / own positions = 1 / the pool's
    # An affine map of xhat, by the kernel that rounds once: as one of y, its terms cancel where the mean is far
    # above the deviation, and in bfloat16 the gradient was off by a tenth.
    dx = F.batch_norm(y, mean, rstd.pow(-2), per_position * sum_g_xhat, per_position * sum_g, False, 0.0, 0.0)
    dx.addcmul_(g, scale.view(1, -1, 1, 1).to(dx.dtype))
    return dx, dgamma, dbeta
