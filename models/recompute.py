"""Activation checkpointing that works with every norm: the same numbers, and running statistics updated once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cfg.convolution import ConvSpec
from cfg.plan import Plan
from models.norms.batch_stat import BatchStatNorm

Output = TypeVar("Output")


def checkpointed(run: Callable[..., Output], *inputs: Tensor, layers: Iterable[nn.Module] | None = None) -> Output:
    """Return run(*inputs), whose inner activations are dropped and recomputed in the backward.

    layers: all modules that it runs; by default `run` itself.
    """
    modules = list(layers) if layers is not None else [run] if isinstance(run, nn.Module) else []
    return checkpoint(
        run, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), running_statistics_held(*modules))
    )


@contextmanager
def running_statistics_held(*layers: nn.Module) -> Iterator[None]:
    """Keep forwards in training mode from updating running statistics, for a forward that is a repetition."""
    modules = [module for layer in layers for module in layer.modules()]
    ours = [m for m in modules if isinstance(m, BatchStatNorm) and m.track_running_stats]
    stock = [(m, m.momentum, m.num_batches_tracked) for m in modules if isinstance(m, _BatchNorm)]
    for norm in ours:
        norm.track_running_stats = False
    for batch_norm, _, _ in stock:
        # Not `track_running_stats`: without it the statistics are not passed on, autograd keeps two tensors fewer
        # than in the first forward, and checkpointing raises.
        batch_norm.momentum, batch_norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm in ours:
            norm.track_running_stats = True
        for batch_norm, momentum, batches in stock:
            batch_norm.momentum, batch_norm.num_batches_tracked = momentum, batches


def spans_of(plan: Plan) -> tuple[range, ...]:
    """Cut the layers into consecutive spans for checkpointing, such that training takes the least memory.

    What crosses the edges of the spans is stored, and in the backward also what is inside the span at hand, at most
    that of the largest (Chen et al. 2016, arXiv:1604.06174). For each of a series of limits on the latter, dynamic
    programming finds the edges with the smallest crossings; the best of these is taken.
    """
    inside, crossing = _span_sizes(plan)
    limits = sorted({max(row[-1] for row in inside) / 1.1**step for step in range(60)}, reverse=True)
    cuts = [cut for limit in limits if (cut := _cut(inside, crossing, limit)) is not None]
    return min(cuts, key=lambda cut: cut[0])[1]


def _span_sizes(plan: Plan) -> tuple[list[list[int]], list[list[int]]]:
    """Return two sizes in values per image, at [i][k] those of the span of layers i to i + k: what its layers store for
    the backward, and their outputs that later layers read."""
    count = len(plan.nodes)
    sizes = [node.shape.channels * node.shape.height * node.shape.width for node in plan.nodes]
    # A convolution stores its output before the norm, too; its input is the output of another layer.
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
    """Return the total size and the spans, each at most `limit` inside; None if a single layer exceeds it."""
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
