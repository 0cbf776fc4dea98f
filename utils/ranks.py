"""torch.distributed for a job started by `torchrun`; without it the world size is 1 and everything here is a no-op.

`all_gather`, `all_to_all`, `broadcast`, `all_reduce_sum`, `all_reduce_mean`, `average_gradients` and `any_rank` are
collectives: every rank must call them, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError

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
    """Initialize the process group for the block; a no-op without torchrun.

    Of an error only one rank tells: the first that had it. On the others, which had it too or lost their connection to
    that rank, it becomes SystemExit. A UserError says so if another rank was lost without one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # absent where torch was built without torch.distributed

    store, number, count = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    # Objects are sent over gloo, so that they take no GPU memory.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=COLLECTIVE_TIMEOUT)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"rank {number} has lost the connection to the others at the start ({reason})") from error
    try:
        yield
    except Exception as error:
        # The group is not destroyed: the others may wait for this rank inside NCCL, and that would wait for them. The
        # error is printed, this process ends, and torchrun ends the others.
        is_lost = _is_lost_connection(error)
        if not _is_first(store, otherwise=is_lost):
            raise SystemExit(getattr(error, "exit_code", 2)) from None
        if is_lost:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"rank {number} has lost the connection to the others: one has ended without an error of its own, as "
                f"when memory runs out; go on with --resume ({reason})"
            ) from error
        raise
    dist.destroy_process_group()


def _is_first(store: Any, *, otherwise: bool) -> bool:
    """Return whether no other rank has asked before; `otherwise` if the store is gone with the rank that kept it."""
    try:
        return store.add("ranks that had an error", 1) == 1
    except RuntimeError:
        return otherwise


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def local_device(device: torch.device) -> torch.device:
    """Make the device current and return it. "cuda" without an index becomes the GPU of this process's local rank."""
    if device.type == "cuda" and device.index is None and world_size() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


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


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over ranks, where one that is None on some ranks only counts as zero.

    Not in the backward, as DistributedDataParallel does: a rank that ran out of memory there would leave the others
    waiting, and no second attempt would be possible.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    for parameter, is_used in zip(parameters, any_rank(*[p.grad is not None for p in parameters]), strict=True):
        if is_used and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    all_reduce_mean([parameter.grad for parameter in parameters if parameter.grad is not None])


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return the logical OR over ranks of each flag, so that all ranks take the same branch."""
    if world_size() == 1:
        return flags
    counts = all_reduce_sum(torch.tensor(flags, dtype=torch.int32))
    return tuple(count > 0 for count in counts.tolist())
