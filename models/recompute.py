"""Activation checkpointing that every norm survives: same numbers, one running update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models.norms.batch_stat import BatchStatNorm


def checkpointed(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """layer(*inputs), whose inner activations are dropped and made again in the backward."""
    return checkpoint(
        layer, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), running_statistics_held(layer))
    )


@contextmanager
def running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Forwards in training leave running statistics alone, which they would update a second time."""
    ours = [m for m in module.modules() if isinstance(m, BatchStatNorm) and m.track_running_stats]
    stock = [(m, m.momentum, m.num_batches_tracked) for m in module.modules() if isinstance(m, _BatchNorm)]
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
