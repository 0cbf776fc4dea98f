"""The blocks of a network, and how each layer of a cfg becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cfg.convolution import ConvSpec
from cfg.plan import Node, Plan
from cfg.pooling import AvgPoolSpec, PoolSpec
from cfg.resampling import Reorg3dSpec, UpsampleSpec
from cfg.same_shape import ActivationSpec, DropoutSpec, SoftmaxSpec
from cfg.spec import BLUR_WINDOWS
from cfg.wiring import RouteSpec, SamSpec, ScaleChannelsSpec, ShortcutSpec
from cfg.yolo import YoloSpec
from models.activations import make_activation
from models.norms.contract import ActivationAware, ConvAware, ConvView
from models.norms.factory import NormFactory


class ConvNormAct(nn.Module):
    """Convolution, norm, activation and an optional blur. Without a norm the convolution has a bias instead.

    x (N, C_in, H, W) -> (N, C_out, H', W'). A ConvAware norm gets the convolution, too; its name does not matter.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: nn.Module | None, activation: nn.Module, blur: nn.Module | None = None
    ) -> None:
        super().__init__()
        assert (conv.bias is None) == (norm is not None), "either the norm or the convolution has the bias"
        self.conv = conv
        self.norm = norm
        self.act = activation
        self.blur = blur
        self.norm_activates = isinstance(norm, ActivationAware) and norm.take_over(activation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if isinstance(self.norm, ConvAware):
            y = self.norm(y, ConvView(self.conv, x))
        elif self.norm is not None:
            y = self.norm(y)
        y = y if self.norm_activates else self.act(y)
        return y if self.blur is None else self.blur(y)

    @property
    def bias(self) -> Tensor:
        """(C_out,) of the norm, or of the convolution without a norm."""
        bias = self.conv.bias if self.norm is None else self.norm.bias
        assert isinstance(bias, Tensor)
        return bias

    @classmethod
    def make(
        cls,
        in_channels: int,
        filters: int,
        size: int,
        *,
        norm: NormFactory | None,
        activation: nn.Module,
        blur: nn.Module | None = None,
        **geometry: Any,
    ) -> ConvNormAct:
        """Without a norm, or if its factory returns None, the convolution gets a bias. geometry: as in nn.Conv2d."""
        conv_class = getattr(norm, "conv_class", nn.Conv2d)  # such as one with centralized weights
        conv = conv_class(in_channels, filters, size, bias=False, **geometry)
        norm_module = norm(conv) if norm is not None else None
        if norm_module is None:
            conv.bias = nn.Parameter(torch.zeros(filters))
        return cls(conv, norm_module, activation, blur)


@torch.no_grad()
def merge_conv_norm(weight: Tensor, norm: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Return weight and bias, float64 on the CPU, of the one convolution that equals a convolution with this weight
    and no bias, followed in inference by a batch norm with the state dict `norm`."""
    tensors = (weight, *(norm[name] for name in ("running_mean", "running_var", "weight", "bias")))
    weight, mean, var, gamma, beta = (tensor.detach().cpu().double() for tensor in tensors)
    return fuse_conv_bn_weights(weight, None, mean, var, eps, gamma, beta)


class Blur(nn.Module):
    """Fixed low-pass filter that has the strides of the layer before it (darknet's antialiasing; Zhang 2019).

    antialiasing 1: binomial, 3x3, padded with zeros; 2: the mean of 2x2 cells. Neither trained nor stored.
    """

    kernel: Tensor  # (1, 1, size, size)

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


def _blur(spec: ConvSpec | PoolSpec) -> Blur | None:
    return Blur(spec.antialiasing, (spec.stride_y, spec.stride_x)) if spec.antialiasing else None


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
    """Each stride x stride block becomes channels, ordered by position in the block, then by input channel."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        blocks = F.pixel_unshuffle(x, self.stride)  # ordered by input channel, then by position
        return blocks.view(x.shape[0], x.shape[1], -1, *blocks.shape[2:]).transpose(1, 2).flatten(1, 2)


class Route(nn.Module):
    """Concatenates channel group `group_id` of `groups` of each input."""

    def __init__(self, groups: int = 1, group_id: int = 0) -> None:
        super().__init__()
        self.groups, self.group_id = groups, group_id

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.groups > 1:
            inputs = tuple(x.chunk(self.groups, dim=1)[self.group_id] for x in inputs)
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)


class Shortcut(nn.Module):
    """Adds its inputs, then activates. Where the numbers of channels differ, the common first ones are added."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act = activation

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            x = _add_common(x, other)
        return self.act(x)


class WeightedShortcut(nn.Module):
    """Shortcut of inputs times trained weights (Tan et al. 2020, BiFPN, section 3.3).

    weight: (inputs,) or, per channel, (inputs, C); the first is that of the previous layer. normalization: none, relu
    or softmax over the inputs. Weights start at 1, a plain shortcut without normalization; darknet adds noise up to
    0.01.
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
        """Return the normalized weights, of the shape of `weight`."""
        if self.normalization == "none":
            return self.weight
        by_relu = self.normalization == "relu"
        positive = self.weight.relu() if by_relu else (self.weight - self.weight.amax(0)).exp()
        return positive / (self.EPS + positive.sum(0))


def _add_common(x: Tensor, other: Tensor) -> Tensor:
    if other.shape[1] == x.shape[1]:
        return x + other
    common = min(x.shape[1], other.shape[1])
    return torch.cat((x[:, :common] + other[:, :common], x[:, common:]), dim=1)


class Product(nn.Module):
    """Multiplies two inputs, one of which may be broadcast over cells or channels, then activates."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act = activation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(x * y)


class Softmax(nn.Module):
    """Softmax over each of `groups` equal runs of an image's values."""

    def __init__(self, groups: int, temperature: float) -> None:
        super().__init__()
        self.groups, self.temperature = groups, temperature

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(x.shape[0], self.groups, -1) / self.temperature).softmax(-1).view_as(x)


def build_layer(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    """Build the module of one layer of the plan. A new layer type is one more case."""
    match spec := node.spec:
        case ConvSpec():
            return _conv_block(spec, plan, node, norm)
        case PoolSpec():
            pool, blur = DarknetPool(spec.size, spec.window_strides, spec.padding), _blur(spec)
            return pool if blur is None else nn.Sequential(pool, blur)
        case AvgPoolSpec():
            return nn.AdaptiveAvgPool2d(1)
        case UpsampleSpec():
            return Upsample(spec.stride, spec.scale)
        case Reorg3dSpec():
            return SpaceToDepth(spec.stride)
        case RouteSpec():
            return Route(spec.groups, spec.group_id)
        case ShortcutSpec(weights_type="none"):
            return Shortcut(make_activation(spec.activation))
        case ShortcutSpec():
            channels = node.shape.channels if spec.weights_type == "per_channel" else None
            activation = make_activation(spec.activation)
            return WeightedShortcut(len(node.inputs), channels, spec.weights_normalization, activation)
        case SamSpec() | ScaleChannelsSpec():
            return Product(make_activation(spec.activation))
        case SoftmaxSpec():
            return Softmax(spec.groups, spec.temperature)
        case ActivationSpec():
            return make_activation(spec.activation, in_place=False)  # other layers may read its input, too
        case DropoutSpec():
            return nn.Dropout(spec.probability)
        case YoloSpec():
            return nn.Identity()  # never called, the network returns a RawHead; it keeps darknet's layer numbers
    raise NotImplementedError(f"no module is known for [{spec.kind}]")


def _conv_block(spec: ConvSpec, plan: Plan, node: Node, norm: NormFactory) -> ConvNormAct:
    following = plan.nodes[node.index + 1].spec if node.index + 1 < len(plan.nodes) else None
    # RawHead holds logits for either decoder; with new_coords the coder and the loss apply the logistic.
    holds_logits = isinstance(following, YoloSpec) and following.new_coords
    return ConvNormAct.make(
        node.input_shapes[0].channels,
        spec.filters,
        spec.size,
        stride=spec.window_strides,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        norm=norm.for_layer(plan, node) if spec.batch_normalize else None,
        activation=make_activation("linear" if holds_logits else spec.activation),
        blur=_blur(spec),
    )
