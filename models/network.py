"""Plan + norm -> nn.Module: the network a darknet cfg describes."""

from __future__ import annotations

import math
from collections.abc import Callable

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
from models.yolo.head import RawHead

OBJECTNESS_PRIOR = 0.01  # Focal loss (Lin et al. 2017, section 4.1): start by calling nearly every cell empty


class Network(nn.Module):
    """images (N, 3, H, W) float in 0..1, H and W multiples of the largest stride -> one RawHead per [yolo].

    `layers` has one module per layer of the cfg, so darknet's layer indices are names here. An output is dropped
    as soon as its last reader has run. A network without [yolo] has no heads, but a `last_output`.
    """

    def __init__(self, plan: Plan, norm: NormFactory) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(BUILDERS[type(node.spec)](plan, node, norm) for node in plan.nodes)
        readers = plan.consumers
        self._read_last_by = [
            tuple({s for s in node.inputs if s >= 0 and readers[s][-1] == node.index}) for node in plan.nodes
        ]
        init_weights(self)

    def forward(self, images: Tensor) -> tuple[RawHead, ...]:
        return self._run(images)[0]

    def last_output(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of the last layer: what a network without [yolo], such as a classifier, is there for."""
        assert not self.plan.heads, "a detector's outputs are its heads"
        return self._run(images)[1]

    def _run(self, images: Tensor) -> tuple[tuple[RawHead, ...], Tensor]:
        """The heads, and the output of the last layer that has one."""
        last = images
        outputs: dict[int, Tensor] = {-1: images}
        heads: list[RawHead] = []
        for node, layer, finished in zip(self.plan.nodes, self.layers, self._read_last_by, strict=True):
            inputs = [outputs[source] for source in node.inputs]
            if isinstance(node.spec, YoloSpec):
                heads.append(as_head(inputs[0], node.spec, images.shape[-2:]))
            else:
                last = outputs[node.index] = layer(*inputs)
            for source in finished:
                outputs.pop(source, None)
        return tuple(heads), last


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


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Decay on convolution weights only: not on biases, gamma or beta (darknet convolutional_layer.c)."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
