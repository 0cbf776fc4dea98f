"""Convolutions that use a function of their weight: each filter without its mean, or standardized as well.

Weight centralization (Yan et al., ICLR 2020, section 3.3): each filter has mean zero, so that the mean of the output
no longer moves with the mean of the input patch.

Weight standardization (Qiao et al. 2019, arXiv:1903.10520): each filter has mean zero and variance one. As in the
paper's equations and in timm's StdConv2d, the variance is biased (divisor in/groups * kh * kw) and eps is inside the
root; the value of eps is timm's. The authors' code divides by the unbiased deviation + 1e-5 instead. A filter of one
number becomes zero in both.

The parameter keeps its name and is stored as it was drawn; the function is computed at each use, with autograd
through it.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6  # added to a filter's variance


class ReparametrizedConv2d(nn.Conv2d):
    """Convolution with a function of `weight`. adjective: of its filters, in messages."""

    adjective: ClassVar[str]

    def used_weight(self) -> Tensor:
        """Return the weight that patches are multiplied with, (C, in/groups, kh, kw), attached."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.used_weight(), self.bias)


class CentralizedConv2d(ReparametrizedConv2d):
    """Convolution with `weight` minus its mean over (in/groups, kh, kw), per filter."""

    adjective = "centralized"

    def used_weight(self) -> Tensor:
        return self.weight - self.weight.mean((1, 2, 3), keepdim=True)


class StandardizedConv2d(ReparametrizedConv2d):
    """Convolution with `weight` minus its mean and divided by its deviation over (in/groups, kh, kw), per filter."""

    adjective = "standardized"

    def used_weight(self) -> Tensor:
        filters = self.weight.flatten(1)
        return F.layer_norm(filters, filters.shape[1:], eps=_EPS).view_as(self.weight)


def used_weight(conv: nn.Conv2d) -> Tensor:
    """Return the weight that the convolution multiplies patches with, (C, in/groups, kh, kw), attached."""
    return conv.used_weight() if isinstance(conv, ReparametrizedConv2d) else conv.weight


def filters_of(network: nn.Module) -> str:
    """Return what the network's filters are before they are used: "centralized", "standardized", or "" for as drawn."""
    return next((m.adjective for m in network.modules() if isinstance(m, ReparametrizedConv2d)), "")
