"""The rows of a head's convolution, of which some are for a class: those that a start has for the network's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from models.network import Network

_BOX = range(5)  # x, y, w, h and objectness, which come before an anchor's classes


def by_class_name(
    state: Mapping[str, Tensor], before: Sequence[str], network: Network, now: Sequence[str]
) -> tuple[dict[str, Tensor], int | None]:
    """A state for the classes `before` -> the same for `now`, `network`'s own; and how many of these it knows.

    Before a [yolo] stands a convolution of anchors * (5 + classes) filters. The rows of classes that are new are as the
    network has them. Heads that differ in more than their classes stay as they are; None where none is left.
    """
    rows = {name: len(_BOX) + row for row, name in enumerate(before)}
    known = {len(_BOX) + row: rows[name] for row, name in enumerate(now) if name in rows}
    to, source = [*_BOX, *known], [*_BOX, *known.values()]
    own, heads = network.state_dict(), {}
    for head, spec in zip(network.plan.heads, network.plan.head_specs, strict=True):
        layer, anchors = f"layers.{network.plan.nodes[head].inputs[0]}.", len(spec.mask)
        for name in (name for name in own if name.startswith(layer) and name in state):
            if state[name].shape == (anchors * (len(_BOX) + len(before)), *own[name].shape[1:]):
                made = own[name].unflatten(0, (anchors, -1)).clone()
                made[:, to] = state[name].to(made).unflatten(0, (anchors, -1))[:, source]
                heads[name] = made.flatten(0, 1)
    return {**state, **heads}, len(known) if heads else None
