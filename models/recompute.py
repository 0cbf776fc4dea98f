"""Activation checkpointing that every norm survives: same numbers, one running update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cfg.layers import ConvSpec
from cfg.plan import Plan
from models.norms.batch_stat import BatchStatNorm


def checkpointed(run: Callable[..., Any], *inputs: Tensor, layers: Iterable[nn.Module] | None = None) -> Any:
    """run(*inputs), whose inner activations are dropped and made again in the backward.

    layers: all that it forwards through; by default `run` itself.
    """
    modules = tuple(layers) if layers is not None else (run,)
    return checkpoint(
        run, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), running_statistics_held(*modules))
    )


@contextmanager
def running_statistics_held(*layers: Any) -> Iterator[None]:
    """Forwards in training leave running statistics alone, which they would update a second time."""
    modules = [module for layer in layers for module in layer.modules()]
    ours = [m for m in modules if isinstance(m, BatchStatNorm) and m.track_running_stats]
    stock = [(m, m.momentum, m.num_batches_tracked) for m in modules if isinstance(m, _BatchNorm)]
    for norm in ours:
        norm.track_running_stats = False
    for norm, _, _ in stock:
        # Not `track_running_stats`: without it the statistics are not passed on, autograd keeps two tensors fewer
        # than in the first forward, and checkpointing raises.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm in ours:
            norm.track_running_stats = True
        for norm, momentum, batches in stock:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def spans_of(plan: Plan) -> tuple[range, ...]:
    """The layers in consecutive spans, of which one at a time has its activations: cut where it takes least memory.

    What stays is what crosses the spans' edges, and in the backward what is inside of the largest span, Chen et al.
    2016 (arXiv:1604.06174). For each of a series of limits to the latter, the edges at which least crosses are found
    by dynamic programming; the best of these is taken.
    """
    inside, crossing = _spans_in_numbers(plan)
    limits = sorted({max(row[-1] for row in inside) / 1.1**step for step in range(60)}, reverse=True)
    found = [cut for limit in limits if (cut := _cut(inside, crossing, limit)) is not None]
    return min(found, key=lambda cut: cut[0])[1]


def _spans_in_numbers(plan: Plan) -> tuple[list[list[int]], list[list[int]]]:
    """For a span from layer i to before layer i + k + 1, at [i][k], numbers per image: those that its layers keep
    for their backward, and those of their outputs that later layers read."""
    count = len(plan.nodes)
    sizes = [node.shape.channels * node.shape.height * node.shape.width for node in plan.nodes]
    # A convolution keeps its input, which is another's output, and before its norm what it made of it.
    kept = [size * (2 if isinstance(n.spec, ConvSpec) else 1) for n, size in zip(plan.nodes, sizes, strict=True)]
    last_read_by = [max(readers, default=count) for readers in plan.consumers]
    inside, crossing = [], []
    for start in range(count):
        insides, crossings, held, crosses = [], [], 0, 0
        for layer in range(start, count):
            held += kept[layer]
            crosses += sizes[layer]
            sources = (source for source in set(plan.nodes[layer].inputs) if source >= start)
            crosses -= sum(sizes[source] for source in sources if last_read_by[source] == layer)
            insides.append(held)
            crossings.append(crosses)
        inside.append(insides)
        crossing.append(crossings)
    return inside, crossing


def _cut(inside: list[list[int]], crossing: list[list[int]], limit: float) -> tuple[int, tuple[range, ...]] | None:
    """The numbers it takes, and the spans, each within the limit inside; None where a single layer is not."""
    count = len(inside)
    least = [0, *[math.inf] * count]
    began = [0] * (count + 1)
    for start in range(count):
        for length, (held, crosses) in enumerate(zip(inside[start], crossing[start], strict=True), 1):
            if held > limit:
                break
            if least[start] + crosses < least[start + length]:
                least[start + length], began[start + length] = least[start] + crosses, start
    if math.isinf(least[count]):
        return None
    spans, stop = [], count
    while stop:
        spans.append(range(began[stop], stop))
        stop = began[stop]
    largest = max(inside[span.start][len(span) - 1] for span in spans)
    return int(least[count]) + largest, tuple(reversed(spans))
