"""Plan + norm -> Network: the nn.Module that a darknet cfg describes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfg.convolution import ConvSpec
from cfg.plan import Plan
from cfg.yolo import YoloSpec
from models.blocks import ConvNormAct, build_layer
from models.norms.table import NormFactory
from models.recompute import checkpointed, spans_of
from models.yolo.head import RawHead, init_head


class Network(nn.Module):
    """images (N, 3, H, W) float in 0..1, H and W multiples of the largest stride -> one RawHead per [yolo].

    `layers` has one module per layer of the cfg, under darknet's layer index. An output is dropped as soon as its last
    reader has run. A network without [yolo] has no heads, but a `last_output`.

    After `recompute_activations`, training uses activation checkpointing over spans of layers.
    """

    def __init__(self, plan: Plan, norm: NormFactory) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(build_layer(node.spec, plan, node, norm) for node in plan.nodes)
        # The network's input counts as layer -1.
        readers: dict[int, Sequence[int]] = {-1: [n.index for n in plan.nodes if -1 in n.inputs]}
        readers |= dict(enumerate(plan.consumers))
        self._last = max((n.index for n in plan.nodes if not isinstance(n.spec, YoloSpec)), default=-1)
        for index in (self._last, *(source for head in plan.heads for source in plan.nodes[head].inputs)):
            readers[index] = [len(plan.nodes)]
        # Per layer, the layer until which its output is held.
        self._held_until = {index: max(by, default=index) for index, by in readers.items()}
        self._spans: Sequence[range] = [range(len(plan.nodes))]
        self.frozen_layers = 0  # the first N layers (`models/freeze.py`)
        init_weights(self)

    def train(self, mode: bool = True) -> Network:
        """Set the mode of all layers but the frozen ones, which stay in eval mode."""
        super().train(mode)
        self.layers[: self.frozen_layers].eval()
        return self

    def recompute_activations(self) -> None:
        self._spans = spans_of(self.plan)

    def forward(self, images: Tensor) -> tuple[RawHead, ...]:
        return self._run(images)[0]

    def last_output(self, images: Tensor) -> Tensor:
        """Return the last layer's output (N, C, H, W), for a network without [yolo], such as a classifier."""
        assert not self.plan.heads, "a detector's outputs are its heads"
        return self._run(images)[1]

    def _run(self, images: Tensor) -> tuple[tuple[RawHead, ...], Tensor]:
        """Return the heads, and the output of the last layer that is not a [yolo]."""
        outputs: dict[int, Tensor] = {-1: images}
        spans = self._spans if self.training else [range(len(self.layers))]
        for span in spans:
            forward = partial(self._run_span, span, tuple(outputs))
            if len(spans) > 1:
                held = checkpointed(forward, *outputs.values(), layers=self.layers[span.start : span.stop])
            else:
                held = forward(*outputs.values())
            outputs = dict(zip(self._held_after(span), held, strict=True))
        heads = zip(self.plan.heads, self.plan.head_specs, strict=True)
        inputs = ((outputs[self.plan.nodes[index].inputs[0]], spec) for index, spec in heads)
        return tuple(RawHead.from_output(output, spec, images.shape[-2:]) for output, spec in inputs), outputs[
            self._last
        ]

    def _run_span(self, span: range, layers: tuple[int, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a span on `inputs`, the outputs of `layers`. Returns the outputs of `_held_after` it."""
        outputs = dict(zip(layers, inputs, strict=True))
        for index in span:
            node = self.plan.nodes[index]
            if not isinstance(node.spec, YoloSpec):
                outputs[index] = self.layers[index](*(outputs[source] for source in node.inputs))
            outputs = {source: output for source, output in outputs.items() if self._held_until[source] > index}
        return tuple(outputs[index] for index in self._held_after(span))

    def _held_after(self, span: range) -> tuple[int, ...]:
        """Return the layers up to the end of the span whose outputs are still needed."""
        return tuple(index for index in range(-1, span.stop) if self._held_until[index] >= span.stop)


@torch.no_grad()
def init_weights(network: Network) -> None:
    """Initialize convolutions by He et al. 2015, and those before a [yolo] by `init_head`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_in", nonlinearity="leaky_relu")
    for index, spec in zip(network.plan.heads, network.plan.head_specs, strict=True):
        block = network.layers[index - 1] if index else None
        if isinstance(block, ConvNormAct):
            init_head(block.conv.weight, block.bias, spec)


def parameter_groups(network: Network, *, weight_decay: float, backbone_rate: float = 1.0) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, without frozen parameters.

    A group's learning rate is the schedule's times its `lr_scale`: a convolution's learning_rate in the cfg, times
    backbone_rate in all layers but those before a [yolo]. Weight decay applies to convolution weights only, not to
    biases, gamma or beta (darknet convolutional_layer.c).
    """
    decayed = {id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d)}
    head_inputs = {source for index in network.plan.heads for source in network.plan.nodes[index].inputs}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for node, layer in zip(network.plan.nodes, network.layers, strict=True):
        scale = node.spec.learning_rate if isinstance(node.spec, ConvSpec) else 1.0
        scale *= 1.0 if node.index in head_inputs else backbone_rate
        for parameter in layer.parameters():
            if parameter.requires_grad:
                decay = weight_decay if id(parameter) in decayed else 0.0
                groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]
