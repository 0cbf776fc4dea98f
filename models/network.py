"""Plan + norm -> nn.Module: the network a darknet cfg describes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cfg.layers import ConvSpec, PoolSpec, RouteSpec, ShortcutSpec, UpsampleSpec, YoloSpec
from cfg.plan import Node, Plan
from models.blocks import ConvNormAct, DarknetPool, Route, Shortcut, Upsample, make_activation
from models.norms.table import NormFactory
from models.yolo.head import RawHead
from utils.errors import UserError

OBJECTNESS_PRIOR = 0.01  # Focal loss (Lin et al. 2017, section 4.1): start by calling nearly every cell empty


class Network(nn.Module):
    """images (N, 3, H, W) float in 0..1, H and W multiples of the largest stride -> one RawHead per [yolo].

    `layers` has one module per layer of the cfg, so darknet's layer indices are names here. An output is dropped
    as soon as its last reader has run.
    """

    def __init__(self, plan: Plan, norm: NormFactory) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(build_layer(plan, node, norm) for node in plan.nodes)
        readers = plan.consumers
        self._read_last_by = [
            tuple({s for s in node.inputs if s >= 0 and readers[s][-1] == node.index}) for node in plan.nodes
        ]
        init_weights(self)

    def forward(self, images: Tensor) -> tuple[RawHead, ...]:
        outputs: dict[int, Tensor] = {-1: images}
        heads: list[RawHead] = []
        for node, layer, finished in zip(self.plan.nodes, self.layers, self._read_last_by, strict=True):
            inputs = [outputs[source] for source in node.inputs]
            if isinstance(node.spec, YoloSpec):
                heads.append(as_head(inputs[0], node.spec, images.shape[-2:]))
            else:
                outputs[node.index] = layer(*inputs)
            for source in finished:
                outputs.pop(source, None)
        return tuple(heads)


def as_head(output: Tensor, spec: YoloSpec, input_hw: torch.Size) -> RawHead:
    """(N, A * (5 + C), H, W), darknet's channel order -> RawHead."""
    images, _, height, width = output.shape
    logits = output.view(images, len(spec.mask), 5 + spec.classes, height, width)
    return RawHead(
        logits=logits.permute(0, 1, 3, 4, 2),
        spec=spec,
        stride_px=(input_hw[0] / height, input_hw[1] / width),
    )


def build_layer(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    """UserError, with the cfg's line, for what the cfg language has and this network does not."""
    build = BUILDERS.get(type(node.spec))
    if build is None:
        kind = type(node.spec).__name__.removesuffix("Spec").lower()
        raise UserError(f"{plan.path}:{node.line}: [{kind}] layers can be read but not built yet")
    try:
        return build(plan, node, norm)
    except UserError as error:
        raise UserError(f"{plan.path}:{node.line}: {error}") from error


def _build_conv(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    spec = node.spec
    activation = spec.activation
    if _feeds_new_coords(plan, node):
        if activation != "logistic":
            raise UserError("a [yolo] with new_coords=1 needs activation=logistic in the layer before it")
        # RawHead holds logits whatever the decoder; the sigmoid is the coder's and the loss's business.
        activation = "linear"
    return ConvNormAct.make(
        node.input_shapes[0].channels,
        spec.filters,
        spec.size,
        stride=(spec.stride_y, spec.stride_x),
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        norm=norm if spec.batch_normalize else None,
        activation=make_activation(activation),
    )


def _feeds_new_coords(plan: Plan, node: Node) -> bool:
    following = plan.nodes[node.index + 1 : node.index + 2]
    return any(isinstance(n.spec, YoloSpec) and n.spec.new_coords for n in following)


def _build_route(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    return Route(node.spec.groups, node.spec.group_id)


def _build_shortcut(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    if node.spec.weights_type != "none":
        raise UserError("weighted [shortcut] layers are not built yet")
    return Shortcut(make_activation(node.spec.activation))


def _build_pool(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    return DarknetPool(node.spec.size, (node.spec.stride_y, node.spec.stride_x), node.spec.padding)


def _build_upsample(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    return Upsample(node.spec.stride)


def _build_yolo(plan: Plan, node: Node, norm: NormFactory) -> nn.Module:
    return nn.Identity()  # has no parameters; its place keeps the numbering


BUILDERS: dict[type, Callable[[Plan, Node, NormFactory], nn.Module]] = {
    ConvSpec: _build_conv,
    RouteSpec: _build_route,
    ShortcutSpec: _build_shortcut,
    PoolSpec: _build_pool,
    UpsampleSpec: _build_upsample,
    YoloSpec: _build_yolo,
}


@torch.no_grad()
def init_weights(network: Network) -> None:
    """He et al. 2015 for convolutions; the heads start sure that there is nothing."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_in", nonlinearity="leaky_relu")
    for index in network.plan.heads:
        block = network.layers[index - 1]
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
