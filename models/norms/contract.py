"""What a norm may ask for, beyond its input.

A norm claims neither, one or both of two capabilities, so `nn.BatchNorm2d`, `nn.GroupNorm` or anybody's norm
plugs in unchanged:

- `ConvAware`: it is called with `(y, ConvView)` instead of `(y)`, because it needs the convolution before it.
- `BatchAware` (utils/clock.py): the trainer tells it which mini-batch of which batch comes next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from models.norms.moments import Moments


class ConvView:
    """The convolution that made a norm's input, seen as y = W . patches, with the geometry hidden.

    Shapes: C output channels, G groups, K = (input channels / G) * kh * kw numbers in a patch.
    """

    def __init__(self, conv: nn.Conv2d, x: Tensor) -> None:
        self._conv = conv
        self._x = x.detach()

    @property
    def weight(self) -> Tensor:
        """(C, in/G, kh, kw), attached: the parameter itself."""
        return self._conv.weight

    def correlate(self, grad: Tensor) -> Tensor:
        """Sum over positions of grad * patch: the weight gradient of the convolution.

        grad: (N, C, H, W) like the conv's output -> (C, K) in grad's dtype.
        """
        return self._weight_gradient(grad, self._x.to(grad.dtype), self._conv.weight).flatten(1)

    def covariance(self, y: Tensor, own: Moments) -> Tensor:
        """cov(y, patch) over images and positions, (C, K), for the conv's output y with the moments `own`."""
        return self.correlate((y.detach().to(own.mean.dtype) - own.mean.view(1, -1, 1, 1)) / own.count)

    def mean_patch(self, dtype: torch.dtype) -> Tensor:
        """Mean patch over images and positions, (G, K): one row a group, shared by its channels."""
        summed = self._x.to(dtype).sum(0, keepdim=True)
        conv = self._conv
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                summed.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
            )
        )
        uniform = summed.new_full((1, conv.groups, height, width), 1 / (len(self._x) * height * width))
        return self._weight_gradient(uniform, summed, conv.weight[: conv.groups]).flatten(1)

    def per_channel(self, per_group: Tensor) -> Tensor:
        """(..., G, K) -> (..., C, K): each channel sees its group's row."""
        return per_channel(per_group, self._conv.out_channels)

    def _weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        conv = self._conv
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight.detach().to(grad.dtype),
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            [False, True, False],
        )[1]


def per_channel(per_group: Tensor, channels: int) -> Tensor:
    """(..., G, K) -> (..., channels, K): each channel sees its group's row."""
    groups = per_group.shape[-2]
    if groups == 1:
        return per_group.expand(*per_group.shape[:-2], channels, per_group.shape[-1])
    return per_group.repeat_interleave(channels // groups, dim=-2)


class ConvAware(ABC):
    """A norm that must see the convolution before it."""

    @abstractmethod
    def forward(self, y: Tensor, view: ConvView) -> Tensor:
        """Normalise y (N, C, H, W), the output of the convolution behind `view`."""
