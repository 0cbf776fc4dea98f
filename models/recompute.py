"""Activation checkpointing that every norm survives: same numbers, one running update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpointed(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """layer(*inputs), whose inner activations are dropped and made again in the backward."""
    return checkpoint(
        layer, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), running_statistics_held(layer))
    )


@contextmanager
def running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Forwards in training leave running statistics alone. Stock batch norm would update them at each."""
    norms = [m for m in module.modules() if getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
