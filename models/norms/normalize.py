"""The forward and backward that batch-statistics norms share.

A mini-batch that holds the share alpha of the moments it is normalized with has the gradient

    dx = gamma * r * (g - alpha * (mean(g) + xhat * mean(g * xhat))),   r = 1 / sqrt(var + eps)

With alpha = 1 that is batch norm's (Ioffe & Szegedy 2015); with alpha < 1 it is the exact partial derivative with the
rest of the moments held constant: equation (1) of docs/gradients.md. `Past` adds the gradient through the rest: (2).
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

from models.norms import across_ranks as collectives
from models.norms.moments import Moments

# Activations whose autograd keeps their input (forward in place, backward). The others in use keep their output, which
# the next layer keeps anyway.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "mish": (lambda z: F.mish(z, inplace=True), torch.ops.aten.mish_backward),
    "silu": (lambda z: F.silu(z, inplace=True), torch.ops.aten.silu_backward),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """The part of the moments that is not this mini-batch's, and how it moves with the convolution's weight W.

    weight: the parameter, or what was computed from it, attached. bias: (C,) of the convolution, attached, or None.
    share, () or (C,): the past's in the moments. mean (C,): the past's. patch (G, K) or (C, K): d mean / dW of the past
    alone. cov (C, K): half of its d var / dW.
    """

    weight: Tensor
    bias: Tensor | None = None
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
    past: Past | None = None,
    across_ranks: bool = False,
    activation: str | None = None,
) -> Tensor:
    """Normalize y (N, C, H, W) with `moments`, whose count may be () or (C,).

    is_share: whether the gradient treats y as a share of the moments, or (False) as all of them; the values are the
    same. across_ranks: y is this rank's part of a mini-batch that all ranks hold; the gradients of their losses to its
    moments are summed.

    `activation`, one of ACTIVATIONS, is applied to the result. Its input is not kept but recomputed from y in the
    backward: of the three tensors that convolution, norm and activation would keep, two are enough.
    """
    alpha = (y.numel() // y.shape[1]) / moments.count if is_share else None
    conv: tuple[Tensor | None, ...] = (None, None)
    parts: tuple[Tensor | None, ...] = (None,) * 4
    if past is not None:
        conv, parts = (past.weight, past.bias), (past.share, past.mean, past.patch, past.cov)
    constants = (moments.mean, moments.var, alpha, eps, across_ranks, activation)
    return _Normalize.apply(y, gamma, beta, *conv, *constants, *parts)


def renormalize(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    own: Moments,
    r: Tensor,
    d: Tensor,
    *,
    eps: float,
    across_ranks: bool,
    activation: str | None,
) -> Tensor:
    """Return gamma * (xhat * r + d) + beta with xhat by y's own moments and r, d (C,) constants (Ioffe 2017).

    The rest as in `normalize`; a rank's part is a share of the mini-batch's own moments.
    """
    return normalize(
        y,
        gamma * r,
        beta + gamma * d,
        own,
        eps=eps,
        is_share=across_ranks,
        across_ranks=across_ranks,
        activation=activation,
    )


class _Normalize(Function):
    """The first five arguments have gradients; the ten after them are constants."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        alpha: Tensor | None,
        eps: float,
        across_ranks: bool,
        activation: str | None,
        past_share: Tensor | None,
        past_mean: Tensor | None,
        past_patch: Tensor | None,
        past_cov: Tensor | None,
    ) -> Tensor:
        rstd = torch.rsqrt(var + eps)
        to_recompute = (None, None) if activation is None else (beta, var)
        ctx.save_for_backward(y, gamma, mean, rstd, alpha, *to_recompute, past_share, past_mean, past_patch, past_cov)
        ctx.across_ranks, ctx.activation, ctx.eps = across_ranks, activation, eps
        ctx.weight_shape, ctx.has_bias = None if weight is None else weight.shape, bias is not None
        z = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
        return z if activation is None else ACTIVATIONS[activation][0](z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, gamma, mean, rstd, alpha, beta, var, past_share, past_mean, past_patch, past_cov = ctx.saved_tensors
        if ctx.activation is not None:
            z = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, ctx.eps)
            g = ACTIVATIONS[ctx.activation][1](g, z)
            del z
        scale = gamma.to(rstd.dtype) * rstd
        if ctx.across_ranks:
            dx, dgamma, dbeta = _backward_across_ranks(g, y, gamma, scale, mean, rstd, alpha)
        else:
            # Batch norm's kernel with our moments gives dx for alpha = 1, and the sums that are needed anyway. dx is
            # linear in gamma and the sums do not depend on it, so alpha can be folded into gamma at no cost.
            share_of_gamma = gamma if alpha is None else (gamma * alpha).to(gamma.dtype)
            dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
                g, y, share_of_gamma, None, None, mean, rstd, True, 0.0, [True, True, True]
            )
            if alpha is not None:  # the rest of dx: moments held constant
                dx.addcmul_(g, ((1 - alpha) * scale).view(1, -1, 1, 1).to(dx.dtype))
        dweight = dbias = None
        if ctx.weight_shape is not None:
            # Equation (2): half of d var / dW through the past is its mean of (y - mean) * patch, which is its
            # covariance, shifted from its own mean to the pooled one.
            to_half_var = -past_share * scale * rstd * dgamma
            to_mean = -past_share * scale * dbeta + to_half_var * (past_mean - mean)
            # Not a view itself, so that autograd adds the convolution's own gradient to it in place.
            dweight = past_cov.view(ctx.weight_shape) * to_half_var.view(-1, 1, 1, 1)
            add_outer(dweight.flatten(1), to_mean, past_patch)
            dbias = to_mean if ctx.has_bias else None  # its patch is the number 1, which has no covariance
        return dx, dgamma, dbeta, dweight, dbias, *(None,) * 10


def add_outer(target: Tensor, per_channel: Tensor, patch: Tensor) -> None:
    """Add per_channel (C,) times patch (G, K) or (C, K) to target (C, K), in place; a channel takes its group's row."""
    rows = patch.shape[0]
    if rows == 1:
        target.addr_(per_channel, patch[0])
    else:
        target.view(rows, -1, target.shape[1]).addcmul_(per_channel.view(rows, -1, 1), patch[:, None])


def _backward_across_ranks(
    g: Tensor, y: Tensor, gamma: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, alpha: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the module's formula with sums over all ranks. dgamma and dbeta stay this rank's: DDP averages them."""
    assert alpha is not None, "across ranks a mini-batch is always a share"
    _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        g, y, gamma, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    sum_g_xhat, sum_g = collectives.sum_over_ranks(dgamma, dbeta)
    per_position = -scale * (alpha * y.shape[1] / y.numel())  # alpha / own positions = 1 / the pool's
    # An affine map of xhat, by the kernel that rounds once. As an affine map of y its terms would cancel where the mean
    # is far above the deviation: in bfloat16 the gradient was off by a tenth.
    dx = F.batch_norm(y, mean, rstd.pow(-2), per_position * sum_g_xhat, per_position * sum_g, False, 0.0, 0.0)
    dx.addcmul_(g, scale.view(1, -1, 1, 1).to(dx.dtype))
    return dx, dgamma, dbeta
