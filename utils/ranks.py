"""torch.distributed for a job started by `torchrun`; without it the world size is 1 and everything here is a no-op.

`all_gather`, `all_to_all`, `broadcast`, `all_reduce_sum`, `all_reduce_mean` and `any_rank` are collectives: every rank
must call them, in the same order.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")

# How long a collective waits for the other ranks: longer than any evaluation or file write.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the global rank, 0 to world_size() - 1."""
    return dist.get_rank() if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Return whether this is rank 0, which prints and writes files."""
    return rank() == 0


def restarts() -> int:
    """Return how often `torchrun --max-restarts` has restarted this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job_id() -> str:
    """Return an identifier that survives restarts of the job; "" for a world size of 1. A collective."""
    if world_size() == 1:
        return ""
    return broadcast(f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')} of process {os.getppid()}")


@contextmanager
def process_group() -> Iterator[None]:
    """Initialize the process group for the block; a no-op without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    # Objects are sent over gloo, so that they take no GPU memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=COLLECTIVE_TIMEOUT)
    yield
    # Not after an error on this rank alone: the others wait for it inside NCCL, and destroying the group would wait for
    # them. Without it the error is printed, this process ends, and torchrun ends the others.
    dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Make the device current and return it. "cuda" without an index becomes the GPU of this process's local rank."""
    if device.type == "cuda" and device.index is None and world_size() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def data_parallel(network: nn.Module, *, skips_parts: bool = False) -> nn.Module:
    """Return the network wrapped so that its backward averages gradients over ranks; itself for a world size of 1.

    Buffers are not broadcast: each rank's norms keep the statistics of their own mini-batches, which those of rank 0
    would overwrite. skips_parts: whether a batch may leave out parameters, such as those of a domain without images.
    """
    if world_size() == 1:
        return network
    # torch 2.15 deprecates the second name; earlier versions know no other.
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    off: dict[str, Any] = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
    off |= {"find_unused_parameters": True} if skips_parts else {}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **off)  # else gradients are stored twice


def without_sync(forward: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward does not reduce gradients: for all mini-batches of a batch but the last."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


def all_gather(value: Value) -> list[Value]:
    """Return every rank's value, in rank order, on every rank. Takes plain values and CPU tensors."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_to_all(rows: Tensor, *, sent: list[int], received: list[int]) -> Tensor:
    """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1, ...; return what arrives, in rank order.

    received: how many rows come from each rank. Differentiable: gradients go back the same way.
    """
    if world_size() == 1:
        return rows
    arrived: Tensor = _AllToAll.apply(rows, sent, received)
    return arrived


class _AllToAll(torch.autograd.Function):
    """`all_to_all`. That of torch.distributed.nn is deprecated, and its successor is not public yet."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
        return arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _AllToAll.apply(grads[0], ctx.received, ctx.sent), None, None


def broadcast(value: Value) -> Value:
    """Return rank 0's value on every rank."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum the tensor over ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in place, with one all-reduce."""
    if world_size() == 1 or not tensors:
        return
    flat = all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors]))
    flat /= world_size()
    for tensor, mean in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return the logical OR over ranks of each flag, so that all ranks take the same branch."""
    if world_size() == 1:
        return flags
    counts = all_reduce_sum(torch.tensor(flags, dtype=torch.int32))
    return tuple(count > 0 for count in counts.tolist())
