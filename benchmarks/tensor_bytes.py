"""What a training holds besides its weights: memory, where no counter of a GPU tells its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Storages = dict[int, int]  # address -> bytes: tensors that share one are counted once


def saved_storages(run: Callable[[], object], network: nn.Module) -> Storages:
    """Of the tensors that `run`, a forward, saves for its backward; the network's own are left out."""
    known = storages((*network.parameters(), *network.buffers()))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # so that no other takes its place in memory meanwhile
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = run()
    del made
    return {address: size for address, size in storages(saved).items() if address not in known}


def state_storages(network: nn.Module) -> Storages:
    """Of all tensors that modules hold, buffers or not, their weights left out."""
    held = (value for module in network.modules() for value in (*module._buffers.values(), *vars(module).values()))
    return storages(value for value in held if isinstance(value, Tensor))


def storages(tensors: Iterable[Tensor]) -> Storages:
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


def saved_bytes(run: Callable[[], object], network: nn.Module) -> int:
    return sum(saved_storages(run, network).values())


def state_bytes(network: nn.Module) -> int:
    return sum(state_storages(network).values())
