"""The alphabet: the few blocks networks are spelled with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfg.spec import BLUR_WINDOWS
from models.norms.batch_stat import BatchStatNorm
from models.norms.contract import ConvAware, ConvView
from models.norms.table import NormFactory

FUSABLE: dict[type[nn.Module], str] = {nn.Mish: "mish", nn.SiLU: "silu"}  # names in models/norms/normalize.py


class ConvNormAct(nn.Module):
    """Convolution, norm, activation, perhaps a blur. Without a norm the convolution has a bias instead.

    x (N, C_in, H, W) -> (N, C_out, H', W'). The one branch is by capability, not by name: a ConvAware norm is
    shown the convolution.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: nn.Module | None, activation: nn.Module, blur: nn.Module | None = None
    ) -> None:
        super().__init__()
        assert (conv.bias is None) == (norm is not None), "a norm has the bias; without one the conv has it"
        self.conv = conv
        self.norm = norm
        self.act = activation
        self.blur = blur
        self.norm_activates = isinstance(norm, BatchStatNorm) and norm.fuse(FUSABLE.get(type(activation), ""))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if isinstance(self.norm, ConvAware):
            y = self.norm(y, ConvView(self.conv, x))
        elif self.norm is not None:
            y = self.norm(y)
        y = y if self.norm_activates else self.act(y)
        return y if self.blur is None else self.blur(y)

    @classmethod
    def make(
        cls,
        in_channels: int,
        filters: int,
        size: int,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        norm: NormFactory | None,
        activation: nn.Module,
        blur: nn.Module | None = None,
    ) -> ConvNormAct:
        """`norm=None` or a factory that returns None makes a convolution with a bias."""
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        conv_class = getattr(norm, "conv_class", nn.Conv2d)  # a norm may want the weights seen otherwise
        conv = conv_class(in_channels, filters, size, bias=False, **geometry)
        made = norm(conv) if norm is not None else None
        if made is None:
            conv.bias = nn.Parameter(torch.zeros(filters))
        return cls(conv, made, activation, blur)


class Blur(nn.Module):
    """The fixed low-pass filter that takes a layer's strides over (darknet's antialiasing 1 and 2; Zhang 2019).

    1: binomial, 3x3, padded with zeros; 2: the mean of 2x2 cells. Nothing of it is trained or stored.
    """

    kernel: Tensor

    def __init__(self, antialiasing: int, stride: tuple[int, int]) -> None:
        super().__init__()
        size, self.padding = BLUR_WINDOWS[antialiasing]
        line = torch.tensor({3: (0.25, 0.5, 0.25), 2: (0.5, 0.5)}[size])
        self.register_buffer("kernel", torch.outer(line, line)[None, None], persistent=False)
        self.stride = stride  # (y, x)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=channels)


class DarknetPool(nn.Module):
    """Max pooling with darknet's total padding: half of it (floored) left and top, the rest right and bottom."""

    def __init__(self, size: int, stride: tuple[int, int], padding: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride  # stride: (y, x)
        before = padding // 2
        after = padding - before
        self.pads = (before, after, before, after)  # left, right, top, bottom
        self.symmetric = before if before == after and before <= size // 2 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.symmetric is not None:
            return F.max_pool2d(x, self.size, self.stride, self.symmetric)
        return F.max_pool2d(F.pad(x, self.pads, value=float("-inf")), self.size, self.stride)


class LocalAvgPool(DarknetPool):
    """The mean over those cells of each window that exist."""

    def forward(self, x: Tensor) -> Tensor:
        sums, counts = (
            F.avg_pool2d(F.pad(t, self.pads), self.size, self.stride, divisor_override=1)
            for t in (x, torch.ones_like(x[:1, :1]))
        )
        return sums / counts


class DepthPool(nn.Module):
    """Output channel g is the maximum of the input channels g, g + out_channels, g + 2 * out_channels, ..."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % self.out_channels
        x = F.pad(x, (0, 0, 0, 0, 0, missing), value=float("-inf"))
        return x.unflatten(1, (-1, self.out_channels)).max(dim=1).values


class Upsample(nn.Module):
    """Nearest neighbour: each cell becomes stride x stride cells. A negative stride sums such blocks instead."""

    def __init__(self, stride: int, scale: float = 1.0) -> None:
        super().__init__()
        self.stride, self.scale = stride, scale

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 0:
            x = F.interpolate(x, scale_factor=self.stride, mode="nearest")
        else:
            x = F.avg_pool2d(x, -self.stride, divisor_override=1)
        return x if self.scale == 1 else x * self.scale


class SpaceToDepth(nn.Module):
    """Each stride x stride block becomes a column of channels: position in the block first, then input channel."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        s = self.stride
        blocks = x.reshape(images, channels, height // s, s, width // s, s).permute(0, 3, 5, 1, 2, 4)
        return blocks.reshape(images, s * s * channels, height // s, width // s)


class Route(nn.Module):
    """Concatenate inputs along channels; of each take only group `group_id` of `groups` contiguous ones."""

    def __init__(self, groups: int = 1, group_id: int = 0) -> None:
        super().__init__()
        self.groups, self.group_id = groups, group_id

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.groups > 1:
            inputs = tuple(x.chunk(self.groups, dim=1)[self.group_id] for x in inputs)
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)


class Shortcut(nn.Module):
    """Add inputs of one shape, then activate. Where channels differ, the common first ones are added."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act = activation

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            x = _add_common(x, other)
        return self.act(x)


class WeightedShortcut(nn.Module):
    """As Shortcut, but of inputs times trained weights (Tan et al. 2020, BiFPN, section 3.3).

    weight: (inputs,) or, per channel, (inputs, C); the first is of the previous layer. normalization: none, relu or
    softmax over the inputs. Weights start at 1, which without a normalization is a plain shortcut; darknet adds
    noise of up to 0.01 to that.
    """

    EPS = 1e-4

    def __init__(self, inputs: int, channels: int | None, normalization: str, activation: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs) if channels is None else torch.ones(inputs, channels))
        self.normalization = normalization
        self.act = activation

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        inputs, channels = 1 + len(others), x.shape[1]
        weights = self.used_weights().view(inputs, -1, 1, 1).expand(inputs, channels, 1, 1).to(x.dtype)
        x = x * weights[0]
        for other, weight in zip(others, weights[1:], strict=True):
            common = min(channels, other.shape[1])
            x = _add_common(x, other[:, :common] * weight[:common])
        return self.act(x)

    def used_weights(self) -> Tensor:
        """Shaped as `weight`: what the inputs are multiplied with."""
        if self.normalization == "none":
            return self.weight
        by_relu = self.normalization == "relu"
        positive = self.weight.relu() if by_relu else (self.weight - self.weight.amax(0)).exp()
        return positive / (self.EPS + positive.sum(0))


class Product(nn.Module):
    """The product of two inputs, one of which may be broadcast over cells or channels, then activated."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act = activation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(x * y)


class GlobalAvgPool(nn.Module):
    """(N, C, H, W) -> (N, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Softmax(nn.Module):
    """Over each of `groups` equal runs of an image's values."""

    def __init__(self, groups: int, temperature: float) -> None:
        super().__init__()
        self.groups, self.temperature = groups, temperature

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(len(x), self.groups, -1) / self.temperature).softmax(-1).view_as(x)


def _add_common(x: Tensor, other: Tensor) -> Tensor:
    if other.shape[1] == x.shape[1]:
        return x + other
    common = min(x.shape[1], other.shape[1])
    return torch.cat((x[:, :common] + other[:, :common], x[:, common:]), dim=1)
