"""Activation checkpointing that works with every norm: the same numbers, and running statistics updated once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TypeVar

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cfg.convolution import ConvSpec
from cfg.plan import Plan
from models.norms.batch_stat import BatchStatNorm

Output = TypeVar("Output")


def checkpointed(run: Callable[..., Output], *inputs: Tensor, layers: Iterable[nn.Module]) -> Output:
    """Return run(*inputs), whose inner activations are dropped and recomputed in the backward.

    layers: all modules that it runs.
    """
    return checkpoint(
        run, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), running_statistics_held(*layers))
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
    sizes = np.array([math.prod(node.shape) for node in plan.nodes])  # values per image
    # A convolution stores its output before the norm, too; its input is the output of another layer.
    kept = sizes * [2 if isinstance(node.spec, ConvSpec) else 1 for node in plan.nodes]
    stored = np.append(0, kept.cumsum())  # by the layers before each
    last_reader = np.array([max(readers, default=len(sizes)) for readers in plan.consumers])
    layer, stop = np.arange(len(sizes))[:, None], np.arange(len(sizes) + 1)
    crosses = (layer < stop) & (stop <= last_reader[:, None])
    crossing = (sizes[:, None] * crosses)[::-1].cumsum(0)[::-1]  # [i, k]: outputs of layers i to k - 1 read from k on
    limits = [stored[-1] / 1.1**step for step in range(60)]
    cuts = [cut for limit in limits if (cut := _cut(stored, crossing, limit)) is not None]
    return min(cuts, key=lambda cut: cut[0])[1]


def _cut(stored: np.ndarray, crossing: np.ndarray, limit: float) -> tuple[float, tuple[range, ...]] | None:
    """Return the total size and the spans, each at most `limit` inside; None if a single layer exceeds it."""
    count = len(crossing)
    # Per layer: the smallest crossings of spans up to it, and where the last of these starts.
    least, best_start = np.full(count + 1, np.inf), np.zeros(count + 1, int)
    least[0] = 0
    for start in range(count):
        total = least[start] + crossing[start]
        better = (stored - stored[start] <= limit) & (total < least)
        better[: start + 1] = False
        least[better], best_start[better] = total[better], start
    if math.isinf(least[count]):
        return None
    edges = [count]
    while edges[-1]:
        edges.append(int(best_start[edges[-1]]))
    edges.reverse()
    return least[count] + np.diff(stored[edges]).max(), tuple(range(*edge) for edge in pairwise(edges))
