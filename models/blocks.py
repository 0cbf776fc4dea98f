"""The alphabet: the few blocks networks are spelled with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.contract import ConvAware, ConvView
from models.norms.table import NormFactory
from utils.errors import UserError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    # In place: the gradient needs the sign only, and neither a convolution nor a norm keeps its output.
    "leaky": lambda: nn.LeakyReLU(0.1, inplace=True),
    "mish": nn.Mish,
    "swish": nn.SiLU,
    "logistic": nn.Sigmoid,
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
}

FUSABLE: dict[type[nn.Module], str] = {nn.Mish: "mish", nn.SiLU: "silu"}  # names in models/norms/normalize.py


def make_activation(name: str) -> nn.Module:
    """UserError for a name that darknet knows and we do not, or nobody knows."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation '{name}' is not supported: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class ConvNormAct(nn.Module):
    """Convolution, norm, activation. Without a norm the convolution has a bias instead.

    x (N, C_in, H, W) -> (N, C_out, H', W'). The one branch is by capability, not by name: a ConvAware norm is
    shown the convolution.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, activation: nn.Module) -> None:
        super().__init__()
        assert (conv.bias is None) == (norm is not None), "a norm has the bias; without one the conv has it"
        self.conv = conv
        self.norm = norm
        self.act = activation
        self.norm_activates = isinstance(norm, BatchStatNorm) and norm.fuse(FUSABLE.get(type(activation), ""))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if isinstance(self.norm, ConvAware):
            y = self.norm(y, ConvView(self.conv, x))
        elif self.norm is not None:
            y = self.norm(y)
        return y if self.norm_activates else self.act(y)

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
    ) -> ConvNormAct:
        """`norm=None` or a factory that returns None makes a convolution with a bias."""
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        conv_class = getattr(norm, "conv_class", nn.Conv2d)  # a norm may want the weights seen otherwise
        conv = conv_class(in_channels, filters, size, bias=False, **geometry)
        made = norm(conv) if norm is not None else None
        if made is None:
            conv.bias = nn.Parameter(torch.zeros(filters))
        return cls(conv, made, activation)


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


class Upsample(nn.Module):
    """Nearest neighbour: each cell becomes stride x stride cells."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.stride, mode="nearest")


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
            if other.shape[1] == x.shape[1]:
                x = x + other
            else:
                common = min(x.shape[1], other.shape[1])
                x = torch.cat((x[:, :common] + other[:, :common], x[:, common:]), dim=1)
        return self.act(x)
