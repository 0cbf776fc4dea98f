"""Where a network's backbone ends and its neck begins."""

from __future__ import annotations

from cfg.convolution import ConvSpec
from cfg.plan import Node, Plan
from cfg.pooling import PoolSpec
from cfg.resampling import Reorg3dSpec, UpsampleSpec
from cfg.wiring import ShortcutSpec


def backbone_layers(plan: Plan) -> int:
    """Return how many first layers are the backbone; the others are neck and heads.

    Neck and heads have begun with the first upsampling, the first pooling of an SPP (stride 1, a window of 3 or more),
    and the first layer that one of the heads does without. Ahead of these the backbone is a row of stages. The last
    stage ends with the last layer that joins several others or reduces the resolution, and, unless that is a shortcut
    or a convolution itself, with the convolution that makes use of it.
    """
    stop = min((node.index for node in plan.nodes if _begins_neck(node)), default=len(plan.nodes))
    stop = min(stop, _layers_of_all_heads(plan))
    ends = [node for node in plan.nodes[:stop] if len(node.inputs) > 1 or _reduces(node)]
    if not ends:
        return 0
    layers = ends[-1].index + 1
    is_done = isinstance(ends[-1].spec, ConvSpec | ShortcutSpec)
    return layers + (not is_done and layers < stop and isinstance(plan.nodes[layers].spec, ConvSpec))


def _begins_neck(node: Node) -> bool:
    spec = node.spec
    is_spp = isinstance(spec, PoolSpec) and spec.size > 2 and spec.stride_x == spec.stride_y == 1
    return is_spp or isinstance(spec, UpsampleSpec)


def _reduces(node: Node) -> bool:
    """Return whether the layer reduces the resolution. A pooling of 2 with stride 1 stands for one that does."""
    return isinstance(node.spec, PoolSpec | Reorg3dSpec) or (isinstance(node.spec, ConvSpec) and node.spec.stride_y > 1)


def _layers_of_all_heads(plan: Plan) -> int:
    """Return how many first layers every head depends on."""
    needed = [set[int]() for _ in plan.heads]
    for head, layers in zip(plan.heads, needed, strict=True):
        layers.add(head)
        for node in reversed(plan.nodes[: head + 1]):
            if node.index in layers:
                layers.update(node.inputs)
    spared = (node.index for node in plan.nodes if not all(node.index in layers for layers in needed))
    return next(spared, len(plan.nodes))
