"""EvoNorm-S0 (Liu et al. 2020, arXiv:2004.02967, table 2): x * sigmoid(v x) / sqrt(var + eps) * gamma + beta.

The variance (biased) is that of groups of channels of one image; no mean is taken out. It takes the place of a layer's
norm and activation. Where the layer is linear or bounded (models/norms/contract.py) the numerator is x and there is no
v, as in timm's EvoNorm2dS0a without activation (its EvoNorm2dS0 does not normalize there).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.norms.contract import ActivationAware, may_be_replaced
from models.norms.group_norm import GroupedSpec, largest_divisor
from models.norms.spec import NormSpec


class EvoNormS0(nn.Module, ActivationAware):
    """EvoNorm-S0 with `groups` groups of channels, which divide `channels`."""

    weight: Tensor  # (C,) gamma
    bias: Tensor  # (C,) beta
    v: Tensor | None  # (C,)

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_parameter("v", None)

    def take_over(self, activation: nn.Module) -> bool:
        if not may_be_replaced(activation):
            return False
        self.v = nn.Parameter(torch.ones_like(self.weight))
        return True

    def forward(self, y: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(self._variance(y) + self.eps)
        if self.v is not None:
            y = y * torch.sigmoid(self.v.to(y.dtype).view(-1, 1, 1) * y)
        return y * scale.to(y.dtype)[..., None, None] + self.bias.to(y.dtype).view(-1, 1, 1)

    def _variance(self, y: Tensor) -> Tensor:
        """Return the variance of each channel's group, (N, C), pooled from its channels', in at least float32."""
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        by_group = (y.shape[0], self.groups, y.shape[1] // self.groups)
        var, mean = (t.reshape(by_group) for t in torch.var_mean(y, (2, 3), correction=0))
        of_group = (var + (mean - mean.mean(2, keepdim=True)).square()).mean(2, keepdim=True)
        return of_group.expand_as(var).flatten(1)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, groups={self.groups}, eps={self.eps}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvoNormS0Spec(GroupedSpec):
    """EvoNorm-S0."""

    name = "evonorm-s0"
    summary = "the variance of groups of channels of each image; with an activation of its own"
    source = "Liu et al. Evolving Normalization-Activation Layers. NeurIPS 2020, arXiv:2004.02967"
    has_batch_statistics = False
    has_running_statistics = False

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        groups = largest_divisor(conv.out_channels, at_most=self.groups)
        return EvoNormS0(conv.out_channels, groups=groups, eps=eps)


SPECS: tuple[type[NormSpec], ...] = (EvoNormS0Spec,)
