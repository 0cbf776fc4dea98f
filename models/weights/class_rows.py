"""Heads for other classes: of their convolutions, the rows of classes that a start has are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from models.network import Network

_BOX = range(5)  # x, y, w, h and objectness, which come before an anchor's classes


def by_class_name(
    state: Mapping[str, Tensor], before: Sequence[str], network: Network, now: Sequence[str]
) -> tuple[Mapping[str, Tensor], int | None]:
    """Convert a state for the classes `before` to one for the classes `now` of `network`.

    Returns it, and how many classes `now` were found; None if no head could be converted.

    The convolution before a [yolo] has anchors * (5 + classes) filters. Rows of new classes are those of `network`.
    Heads that differ in more than their classes are not changed.
    """
    rows = {name: len(_BOX) + row for row, name in enumerate(before)}
    known = {len(_BOX) + row: rows[name] for row, name in enumerate(now) if name in rows}
    to_rows, from_rows = [*_BOX, *known], [*_BOX, *known.values()]
    own, heads = network.state_dict(), {}
    for head, spec in zip(network.plan.heads, network.plan.head_specs, strict=True):
        layer, anchors = f"layers.{network.plan.nodes[head].inputs[0]}.", len(spec.mask)
        for name in (name for name in own if name.startswith(layer) and name in state):
            filter_shape = own[name].shape[1:]
            if state[name].shape == (anchors * (len(_BOX) + len(before)), *filter_shape):
                weight = own[name].reshape(anchors, -1, *filter_shape).clone()
                stored = state[name].to(weight).reshape(anchors, -1, *filter_shape)
                weight[:, to_rows] = stored[:, from_rows]
                heads[name] = weight.flatten(0, 1)
    return {**state, **heads}, len(known) if heads else None
