"""The health of norms in training: how far what normalizes there is from what will normalize afterwards.

A norm of batch statistics trains by those of mini-batches, or of pooled ones, and works by its running statistics.
Where the two differ, the network that is evaluated is not the one that was trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from models.norms.contract import PoolsMoments
from models.norms.moments import Moments
from models.norms.report import gaps
from models.norms.running_stats import as_used, has_running_statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerHealth:
    """Distances from the running statistics at one layer, in the mini-batches of one optimizer step.

    mean_mismatch: the root mean square, over channels and mini-batches b, of (mu_b - mu) / sigma. sigma_mismatch: that
    of sigma_b / sigma - 1. mu and sigma are the running statistics before the step. pooled_mean_mismatch,
    pooled_sigma_mismatch: the same of the statistics that normalized; None where these were the mini-batch's own.
    """

    layer: int
    mean_mismatch: float
    sigma_mismatch: float
    pooled_mean_mismatch: float | None
    pooled_sigma_mismatch: float | None


class NormHealth:
    """Measures the norms with running statistics of a network, in forwards of its training, which it only watches.

    Norms of several domains count to one layer. A compiled network cannot be watched: nothing is measured.
    """

    def __init__(self, network: nn.Module) -> None:
        named = network.named_modules()
        self._layers = {norm: _layer(name) for name, norm in named if has_running_statistics(norm)}
        self._squares: dict[int, list[Tensor]] = {}  # by layer, of each forward: (4,) as in LayerHealth
        self._pools: set[int] = set()  # layers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the forwards within the block, in place of those before."""
        self._squares, self._pools = {}, set()
        hooks = [norm.register_forward_hook(self._look) for norm in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def layers(self) -> tuple[LayerHealth, ...]:
        """Return what was measured, in order of layers; () if nothing was. The host waits for a GPU once."""
        if not self._squares:
            return ()
        means = torch.stack([torch.stack(squares).mean(0) for squares in self._squares.values()]).tolist()
        found = []
        for layer, squares in sorted(zip(self._squares, means, strict=True)):
            mean, sigma, pooled_mean, pooled_sigma = map(math.sqrt, squares)
            pools = layer in self._pools
            found.append(
                LayerHealth(
                    layer=layer,
                    mean_mismatch=mean,
                    sigma_mismatch=sigma,
                    pooled_mean_mismatch=pooled_mean if pools else None,
                    pooled_sigma_mismatch=pooled_sigma if pools else None,
                )
            )
        return tuple(found)

    @torch.no_grad()
    def _look(self, norm: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        own = as_used(norm, Moments.of(inputs[0]))
        used = (own.mean, own.var)
        if isinstance(norm, PoolsMoments) and norm.training and norm.used_moments is not None:
            used = norm.used_moments
            self._pools.add(self._layers[norm])
        squares = [gap.square().mean() for mean, var in ((own.mean, own.var), used) for gap in gaps(norm, mean, var)]
        sigma, mean, pooled_sigma, pooled_mean = squares
        self._squares.setdefault(self._layers[norm], []).append(torch.stack([mean, sigma, pooled_mean, pooled_sigma]))


def summary(layers: tuple[LayerHealth, ...]) -> dict[str, float]:
    """Return the median and the worst layer's mismatch, the larger of its two, as curves: `norm/mini_batch_worst`."""
    kinds = {
        "mini_batch": [max(layer.mean_mismatch, layer.sigma_mismatch) for layer in layers],
        "pooled": [
            max(layer.pooled_mean_mismatch, layer.pooled_sigma_mismatch or 0)
            for layer in layers
            if layer.pooled_mean_mismatch is not None
        ],
    }
    return {
        f"norm/{kind}_{name}": take(mismatches)
        for kind, mismatches in kinds.items()
        if mismatches
        for name, take in (("median", median), ("worst", max))
    }


def _layer(name: str) -> int:
    """Return 3 of "layers.3.norm"."""
    return int(name.split(".")[1])
