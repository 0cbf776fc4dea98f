"""Filter response norm with its threshold (Singh & Krishnan 2020, arXiv:1911.09737): each channel of each image by the
mean of its squares, max(x / sqrt(mean(x^2) + eps) * gamma + beta, tau).

tau, the thresholded linear unit, takes the place of a layer's activation; where the layer is linear or bounded
(models/norms/contract.py) there is none. eps is --norm-eps, 1e-5 by default (the paper: 1e-6). The paper learns eps in
layers of one position, where the norm would leave the sign only; here such layers are refused (effective_batch.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.norms.contract import ActivationAware, may_be_replaced
from models.norms.spec import NormSpec


class FilterResponseNorm(nn.Module, ActivationAware):
    """Filter response norm, with its threshold where that replaces an activation."""

    weight: Tensor  # (C,) gamma
    bias: Tensor  # (C,) beta
    tau: Tensor | None  # (C,)

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_parameter("tau", None)

    def take_over(self, activation: nn.Module) -> bool:
        if not may_be_replaced(activation):
            return False
        self.tau = nn.Parameter(torch.zeros_like(self.bias))
        return True

    def forward(self, y: Tensor) -> Tensor:
        square = y.to(torch.promote_types(y.dtype, torch.float32)).square().mean((2, 3))
        scale = (self.weight * torch.rsqrt(square + self.eps)).to(y.dtype)
        z = y * scale[..., None, None] + self.bias.to(y.dtype).view(-1, 1, 1)
        return z if self.tau is None else torch.maximum(z, self.tau.to(y.dtype).view(-1, 1, 1))

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterResponseNormSpec(NormSpec):
    """Filter response norm with its threshold."""

    name = "frn"
    summary = "the mean square of each channel of each image; with an activation of its own"
    source = "Singh, Krishnan. Filter Response Normalization Layer. CVPR 2020, arXiv:1911.09737"
    has_batch_statistics = False
    has_running_statistics = False
    has_image_statistics = True

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        return FilterResponseNorm(conv.out_channels, eps=eps)

    def values_per_statistic(self, channels: int, positions: int, *, mini_batch: int) -> int:
        return positions


SPECS: tuple[type[NormSpec], ...] = (FilterResponseNormSpec,)
