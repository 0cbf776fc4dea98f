"""Weight centralization: each filter of a convolution has mean zero (Yan et al., ICLR 2020, section 3.3).

The parameter keeps its name and is stored as it was drawn; its mean is subtracted at each use, with autograd through
it. The mean of the output then no longer moves with the mean of the input patch.
"""

from __future__ import annotations

from torch import Tensor, nn


class CentralizedConv2d(nn.Conv2d):
    """Convolution with `weight` minus its mean over (in/groups, kh, kw), per filter."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, used_weight(self), self.bias)


def used_weight(conv: nn.Conv2d) -> Tensor:
    """Return the weight that the convolution multiplies patches with, (C, in/groups, kh, kw), attached."""
    if isinstance(conv, CentralizedConv2d):
        return conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
    return conv.weight
