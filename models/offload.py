"""Activations kept in host memory between forward and backward, by torch's hooks for saved tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from utils.memory import host_memory_like

LEAST_BYTES = 1 << 16  # smaller tensors, such as statistics of norms, stay where they are

Packed = Tensor | tuple[torch.device, Tensor]


@contextmanager
def saved_on_host(network: nn.Module) -> Iterator[None]:
    """Copy what a forward saves for its backward to host memory, and back when the backward asks for it.

    Values and memory formats stay the same. Unlike with `torch.autograd.graph.save_on_cpu`, the network's parameters
    and buffers, which the device holds anyway, are not copied, and a tensor that several operations save is copied
    once. From a GPU to page-locked memory nothing waits for the copies: they run in order with forward and backward.
    """
    own = {_storage_of(tensor) for tensor in (*network.parameters(), *network.buffers())}
    copies: dict[tuple[object, ...], Tensor] = {}

    def pack(tensor: Tensor) -> Packed:
        storage = _storage_of(tensor)
        if tensor.nbytes < LEAST_BYTES or storage in own:
            return tensor
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in copies:
            copy = host_memory_like(tensor)
            # A slice is put in one piece first: from strides that differ, copying would wait.
            source = tensor.detach() if tensor.stride() == copy.stride() else tensor.detach().clone()
            copies[key] = copy.copy_(source, non_blocking=True)
        return tensor.device, copies[key]

    def unpack(packed: Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, copy = packed
        return copy.to(device, non_blocking=True)

    with saved_tensors_hooks(pack, unpack):
        yield


def _storage_of(tensor: Tensor) -> StorageWeakRef:
    """Return a key that keeps the storage's address from being used again, and not its memory from being freed."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
