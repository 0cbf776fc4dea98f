"""Memory that a training holds besides its weights, where no GPU counts its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Storages = dict[int, int]  # address -> bytes: tensors that share one are counted once


def saved_storages(run: Callable[[], object], network: nn.Module) -> Storages:
    """Return the tensors that `run`, a forward, saves for its backward, without the network's own."""
    known = storages((*network.parameters(), *network.buffers()))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # kept, so that no other tensor takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    del outputs
    return {address: size for address, size in storages(saved).items() if address not in known}


def state_storages(network: nn.Module) -> Storages:
    """Return all tensors that modules hold, buffers or not, without parameters."""
    held = (value for module in network.modules() for value in (*module._buffers.values(), *vars(module).values()))
    return storages(value for value in held if isinstance(value, Tensor))


def storages(tensors: Iterable[Tensor]) -> Storages:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def saved_bytes(run: Callable[[], object], network: nn.Module) -> int:
    return sum(saved_storages(run, network).values())


def state_bytes(network: nn.Module) -> int:
    return sum(state_storages(network).values())
