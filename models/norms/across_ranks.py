"""Statistics of the union of all ranks of a `torchrun` job; without one, those of this process.

Every function is a collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from models.norms.moments import Moments
from utils.ranks import world_size


def is_parallel() -> bool:
    """Return whether there is more than one rank."""
    return world_size() > 1


def sum_over_ranks(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Return the sums over ranks of tensors of one shape, in one message."""
    if not is_parallel():
        return vectors
    packed = torch.stack(vectors)
    dist.all_reduce(packed)
    return tuple(packed.unbind())


def pool_over_ranks(own: Moments) -> Moments:
    """Return the moments of all ranks' positions, merged in rank order so that all ranks get the same bits."""
    if not is_parallel():
        return own
    packed = torch.cat((own.count.view(1).to(own.mean.dtype), own.mean, own.var))
    everyone = [torch.empty_like(packed) for _ in range(world_size())]
    dist.all_gather(everyone, packed)
    union: Moments | None = None
    for rank in everyone:
        mean, var = rank[1:].chunk(2)
        moments = Moments(count=rank[0], mean=mean, var=var)
        union = moments if union is None else union.merged_with(moments)
    assert union is not None
    return union
