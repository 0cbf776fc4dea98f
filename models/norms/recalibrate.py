"""Exact population statistics (PreciseBN; Wu & Johnson 2021, "Rethinking Batch in BatchNorm", section 3).

Running averages lag behind weights that were still moving. Here the weights stand still, and the norms are measured one
after the other, in order of execution: all images run through the layers before a norm, which already normalize by
their population statistics, and the moments of its input are pooled over all images. These are exactly the statistics
of inference, however the images were cut into batches. One pass in training mode, as in the paper, measures inputs that
mini-batch statistics have normalized.

Each pass stops at the norm it measures: L norms take about 0.6 L passes (yolov4-pico: 13 for 21 norms).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from models.norms import across_ranks
from models.norms.moments import Moments
from models.norms.running_stats import eval_mode, norms_with_statistics, pixels_for, use_population, watched
from utils.errors import UserError


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Sequence[Tensor], *, but: nn.Module | None = None) -> None:
    """Replace the running statistics of every norm by those of the images; nothing else of the network changes.

    batches: images (N, 3, H, W), uint8 or float in 0..1, on any device; sizes may differ, each position counts the
    same. In a `torchrun` job every rank calls it, with one batch at least, and all get the union's statistics.
    but: a part of the network whose norms keep theirs, such as frozen layers. Raises UserError for a network without
    running statistics, and where there is no image.
    """
    kept = set(but.modules()) if but is not None else set()
    norms = [norm for norm in norms_with_statistics(network).values() if norm not in kept]
    if not batches:
        raise UserError("there is no image to take statistics from")
    with eval_mode(network):
        for norm in _in_order_of_execution(network, norms, batches[0][:1]):
            use_population(norm, across_ranks.pool_over_ranks(_moments_at(network, norm, batches)))


class _Reached(Exception):
    """Signal that a forward has reached the norm that it was run for."""


def _moments_at(network: nn.Module, norm: nn.Module, batches: Sequence[Tensor]) -> Moments:
    """Return the moments of the norm's input over all images."""
    seen: list[Moments] = []

    def look(_: nn.Module, y: Tensor) -> None:
        own = Moments.of(y)
        seen[:] = [seen[0].merged_with(own) if seen else own]
        raise _Reached

    with watched([norm], look):
        for images in batches:
            with suppress(_Reached):
                network(pixels_for(network, images))
    return seen[0]


def _in_order_of_execution(network: nn.Module, norms: list[nn.Module], images: Tensor) -> list[nn.Module]:
    ran: list[nn.Module] = []
    with watched(norms, lambda norm, _: ran.append(norm)):
        network(pixels_for(network, images))
    assert len(ran) == len(set(ran)), "a norm that runs twice in a forward has two populations"
    return ran
