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
from models.norms.domains import DomainNorm
from models.norms.factory import NormFactory
from models.recompute import checkpointed, spans_of
from models.yolo.head import RawHead, init_head


class Network(nn.Module):
    """images (N, 3, H, W) float in 0..1, H and W multiples of the largest stride -> one RawHead per [yolo].

    `layers` has one module per layer of the cfg, under darknet's layer index. An output is dropped as soon as its last
    reader has run. A network without [yolo] has no heads, but a `last_output`.

    Of channels=1 in the cfg, the images are made grey first, by the weights of OpenCV and darknet.

    After `recompute_activations`, training uses activation checkpointing over spans of layers.
    """

    _grey: Tensor | None

    def __init__(self, plan: Plan, norm: NormFactory) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(build_layer(plan, node, norm) for node in plan.nodes)
        self._last = max((n.index for n in plan.nodes if not isinstance(n.spec, YoloSpec)), default=-1)
        # Per layer, the layer until which its output is held: its last reader. The network's input counts as layer -1.
        self._held_until = {index: index for index in range(-1, len(plan.nodes))}
        self._held_until |= {source: node.index for node in plan.nodes for source in node.inputs}
        self.head_inputs = tuple(plan.nodes[index].inputs[0] for index in plan.heads)  # layers that the heads read
        self._held_until |= dict.fromkeys((self._last, *self.head_inputs), len(plan.nodes))
        self._last_read_by: dict[int, list[int]] = {}
        for source, reader in self._held_until.items():
            self._last_read_by.setdefault(reader, []).append(source)
        self._spans: Sequence[range] = [range(len(plan.nodes))]
        grey = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1) if plan.net.channels == 1 else None
        self.register_buffer("_grey", grey, persistent=False)
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
        if self._grey is not None and images.shape[1] == 3:
            images = (images * self._grey).sum(1, keepdim=True)
        outputs: dict[int, Tensor] = {-1: images}
        spans = self._spans if self.training else [range(len(self.layers))]
        for span in spans:
            forward = partial(self._run_span, span, tuple(outputs))
            if len(spans) > 1:
                held = checkpointed(forward, *outputs.values(), layers=self.layers[span.start : span.stop])
            else:
                held = forward(*outputs.values())
            outputs = dict(zip(self._held_after(span), held, strict=True))
        heads = tuple(
            RawHead.from_output(outputs[source], spec, images.shape[-2:])
            for source, spec in zip(self.head_inputs, self.plan.head_specs, strict=True)
        )
        return heads, outputs[self._last]

    def _run_span(self, span: range, layers: tuple[int, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a span on `inputs`, the outputs of `layers`. Returns the outputs of `_held_after` it."""
        outputs = dict(zip(layers, inputs, strict=True))
        for index in span:
            node = self.plan.nodes[index]
            if not isinstance(node.spec, YoloSpec):
                outputs[index] = self.layers[index](*[outputs[source] for source in node.inputs])
            for source in self._last_read_by.get(index, ()):
                outputs.pop(source, None)
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
    for source, spec in zip(network.head_inputs, network.plan.head_specs, strict=True):
        if source >= 0 and isinstance(block := network.layers[source], ConvNormAct):
            init_head(block.conv.weight, block.bias, spec)
    for module in network.modules():
        if isinstance(module, DomainNorm):
            module.begin_alike()


def parameter_groups(network: Network, *, weight_decay: float, backbone_rate: float = 1.0) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, without frozen parameters.

    A group's learning rate is the schedule's times its `lr_scale`: a convolution's learning_rate in the cfg, times
    backbone_rate in all layers but those before a [yolo]. Weight decay applies to convolution weights only, not to
    biases, gamma or beta (darknet convolutional_layer.c).
    """
    decayed = {id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for node, layer in zip(network.plan.nodes, network.layers, strict=True):
        scale = node.spec.learning_rate if isinstance(node.spec, ConvSpec) else 1.0
        scale *= 1.0 if node.index in network.head_inputs else backbone_rate
        for parameter in layer.parameters():
            if parameter.requires_grad:
                decay = weight_decay if id(parameter) in decayed else 0.0
                groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": group, "weight_decay": decay, "lr_scale": scale} for (scale, decay), group in groups.items()]
