"""Plan + norm -> nn.Module: the network a darknet cfg describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfg.layers import (
    ActivationSpec,
    AvgPoolSpec,
    ContrastiveSpec,
    ConvSpec,
    CostSpec,
    DepthPoolSpec,
    DropoutSpec,
    EmptySpec,
    LocalAvgPoolSpec,
    PoolSpec,
    Reorg3dSpec,
    RouteSpec,
    SamSpec,
    ScaleChannelsSpec,
    ShortcutSpec,
    SoftmaxSpec,
    UpsampleSpec,
    YoloSpec,
)
from cfg.plan import Node, Plan
from models.activations import make_activation
from models.blocks import (
    Blur,
    ConvNormAct,
    DarknetPool,
    DepthPool,
    GlobalAvgPool,
    LocalAvgPool,
    Product,
    Route,
    Shortcut,
    Softmax,
    SpaceToDepth,
    Upsample,
    WeightedShortcut,
)
from models.norms.table import NormFactory
from models.recompute import checkpointed, spans_of
from models.yolo.head import RawHead

OBJECTNESS_PRIOR = 0.01  # Focal loss (Lin et al. 2017, section 4.1): start by calling nearly every cell empty


class Network(nn.Module):
    """images (N, 3, H, W) float in 0..1, H and W multiples of the largest stride -> one RawHead per [yolo].

    `layers` has one module per layer of the cfg, so darknet's layer indices are names here. An output is dropped
    as soon as its last reader has run. A network without [yolo] has no heads, but a `last_output`.

    After `recompute_activations`, training keeps only what passes between spans of layers, and makes the rest again in
    the backward.
    """

    def __init__(self, plan: Plan, norm: NormFactory) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(BUILDERS[type(node.spec)](plan, node, norm) for node in plan.nodes)
        # The network's input counts as layer -1.
        readers = {-1: [n.index for n in plan.nodes if -1 in n.inputs], **dict(enumerate(plan.consumers))}
        self._last = max((n.index for n in plan.nodes if not isinstance(n.spec, YoloSpec)), default=-1)
        for index in (self._last, *(source for head in plan.heads for source in plan.nodes[head].inputs)):
            readers[index] = [len(plan.nodes)]
        # Per layer, until which layer its output is held.
        self._held_until = {index: max(by, default=index) for index, by in readers.items()}
        self._spans: Sequence[range] = [range(len(plan.nodes))]
        self.frozen_layers = 0  # so many first ones (`models/freeze.py`)
        init_weights(self)

    def train(self, mode: bool = True) -> Network:
        """Frozen layers stay in eval mode."""
        super().train(mode)
        self.layers[: self.frozen_layers].eval()
        return self

    def recompute_activations(self) -> None:
        self._spans = spans_of(self.plan)

    def forward(self, images: Tensor) -> tuple[RawHead, ...]:
        return self._run(images)[0]

    def last_output(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of the last layer: what a network without [yolo], such as a classifier, is there for."""
        assert not self.plan.heads, "a detector's outputs are its heads"
        return self._run(images)[1]

    def _run(self, images: Tensor) -> tuple[tuple[RawHead, ...], Tensor]:
        """The heads, and the output of the last layer that has one."""
        outputs: dict[int, Tensor] = {-1: images}
        spans = self._spans if self.training else [range(len(self.layers))]
        for span in spans:
            reads = tuple(outputs)
            forward = partial(self._run_span, span, reads)
            if len(spans) > 1:
                made = checkpointed(forward, *outputs.values(), layers=self.layers[span.start : span.stop])
            else:
                made = forward(*outputs.values())
            outputs = dict(zip(self._left_after(span), made, strict=True))
        nodes = self.plan.nodes
        heads = (as_head(outputs[nodes[i].inputs[0]], nodes[i].spec, images.shape[-2:]) for i in self.plan.heads)
        return tuple(heads), outputs[self._last]

    def _run_span(self, span: range, reads: tuple[int, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        """inputs: outputs of the layers `reads` -> what is left after the span, of `_left_after`."""
        outputs = dict(zip(reads, inputs, strict=True))
        for index in span:
            node = self.plan.nodes[index]
            if not isinstance(node.spec, YoloSpec):
                outputs[index] = self.layers[index](*(outputs[source] for source in node.inputs))
            outputs = {source: output for source, output in outputs.items() if self._held_until[source] > index}
        return tuple(outputs[index] for index in self._left_after(span))

    def _left_after(self, span: range) -> tuple[int, ...]:
        """Layers up to the end of the span whose outputs are still asked for."""
        return tuple(index for index in range(-1, span.stop) if self._held_until[index] >= span.stop)


def as_head(output: Tensor, spec: YoloSpec, input_hw: torch.Size) -> RawHead:
    """(N, A * (5 + C), H, W), darknet's channel order -> RawHead."""
    images, _, height, width = output.shape
    logits = output.view(images, len(spec.mask), 5 + spec.classes, height, width)
    return RawHead(
        logits=logits.permute(0, 1, 3, 4, 2),
        spec=spec,
        stride_px=(input_hw[0] / height, input_hw[1] / width),
    )


def _build_conv(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    spec = node.spec
    # RawHead holds logits whatever the decoder; the logistic is the coder's and the loss's business.
    activation = "linear" if _feeds_new_coords(plan, node) else spec.activation
    return ConvNormAct.make(
        node.input_shapes[0].channels,
        spec.filters,
        spec.size,
        stride=spec.conv_strides,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        norm=norm if spec.batch_normalize else None,
        activation=make_activation(activation),
        blur=_make_blur(spec),
    )


def _feeds_new_coords(plan: Plan, node: Node) -> bool:
    following = plan.nodes[node.index + 1 : node.index + 2]
    return any(isinstance(n.spec, YoloSpec) and n.spec.new_coords for n in following)


def _make_blur(spec: ConvSpec | PoolSpec) -> Blur | None:
    return Blur(spec.antialiasing, (spec.stride_y, spec.stride_x)) if spec.antialiasing else None


def _build_shortcut(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    spec = node.spec
    activation = make_activation(spec.activation)
    if spec.weights_type == "none":
        return Shortcut(activation)
    channels = node.shape.channels if spec.weights_type == "per_channel" else None
    return WeightedShortcut(len(node.inputs), channels, spec.weights_normalization, activation)


def _build_pool(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    pool, blur = DarknetPool(node.spec.size, node.spec.pool_strides, node.spec.padding), _make_blur(node.spec)
    return pool if blur is None else nn.Sequential(pool, blur)


def _build_local_avg_pool(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    return LocalAvgPool(node.spec.size, (node.spec.stride_y, node.spec.stride_x), node.spec.padding)


def _build_product(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    return Product(make_activation(node.spec.activation))


def _build_activation(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    return make_activation(node.spec.activation, in_place=False)  # others may read its input, too


def _build_nothing(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    return nn.Identity()  # its place keeps the numbering


BUILDERS: dict[type, Callable[[Plan, Node, NormFactory], nn.Module]] = {
    ActivationSpec: _build_activation,
    AvgPoolSpec: lambda plan, node, norm: GlobalAvgPool(),
    ContrastiveSpec: _build_nothing,
    ConvSpec: _build_conv,
    CostSpec: _build_nothing,
    DepthPoolSpec: lambda plan, node, norm: DepthPool(node.spec.out_channels),
    DropoutSpec: lambda plan, node, norm: nn.Dropout(node.spec.probability),
    EmptySpec: _build_nothing,
    LocalAvgPoolSpec: _build_local_avg_pool,
    PoolSpec: _build_pool,
    Reorg3dSpec: lambda plan, node, norm: SpaceToDepth(node.spec.stride),
    RouteSpec: lambda plan, node, norm: Route(node.spec.groups, node.spec.group_id),
    SamSpec: _build_product,
    ScaleChannelsSpec: _build_product,
    ShortcutSpec: _build_shortcut,
    SoftmaxSpec: lambda plan, node, norm: Softmax(node.spec.groups, node.spec.temperature),
    UpsampleSpec: lambda plan, node, norm: Upsample(node.spec.stride, node.spec.scale),
    YoloSpec: _build_nothing,
}


@torch.no_grad()
def init_weights(network: Network) -> None:
    """He et al. 2015 for convolutions; the heads start sure that there is nothing."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_in", nonlinearity="leaky_relu")
    for index in network.plan.heads:
        block = network.layers[index - 1] if index else None
        if not isinstance(block, ConvNormAct):
            continue
        block.conv.weight.mul_(0.1)
        bias = block.conv.bias if block.norm is None else block.norm.bias
        biases = bias.view(len(network.plan.nodes[index].spec.mask), -1)
        biases.zero_()[:, 4] = math.log(OBJECTNESS_PRIOR / (1 - OBJECTNESS_PRIOR))


def parameter_groups(network: Network, *, weight_decay: float, backbone_rate: float = 1.0) -> list[dict[str, Any]]:
    """Of the parameters that learn, for an optimizer; each group's rate is the schedule's times its `lr_scale`.

    That is a convolution's own learning_rate in the cfg, times backbone_rate in all layers but those that feed a
    [yolo]. Decay on convolution weights only: not on biases, gamma or beta (darknet convolutional_layer.c).
    """
    decayed = {id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d)}
    feeding = {source for index in network.plan.heads for source in network.plan.nodes[index].inputs}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for node, layer in zip(network.plan.nodes, network.layers, strict=True):
        scale = node.spec.learning_rate if isinstance(node.spec, ConvSpec) else 1.0
        scale *= 1.0 if node.index in feeding else backbone_rate
        for parameter in layer.parameters():
            if parameter.requires_grad:
                decay = weight_decay if id(parameter) in decayed else 0.0
                groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]
