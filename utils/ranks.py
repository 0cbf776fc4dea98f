"""The processes of one `torchrun` job, called ranks; a program that was started plainly is a job of one.

`all_gather`, `broadcast`, `all_reduce_sum`, `all_reduce_mean` and `any_rank` are collectives: every rank must call
them, in the same order.
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

# A rank that waits for the others this long takes them for dead: longer than any evaluation or file write.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """From 0 to world_size() - 1, over all machines."""
    return dist.get_rank() if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Whether this is the rank that prints and writes files."""
    return rank() == 0


def restarts() -> int:
    """How often `torchrun --max-restarts` has started this job anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job_id() -> str:
    """What tells this job of several ranks from others, and stays when it is started anew; "" for a job of one."""
    if world_size() == 1:
        return ""
    return broadcast(f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')} of process {os.getppid()}")


@contextmanager
def process_group() -> Iterator[None]:
    """The job that torchrun has put this process into, for as long as the block runs; nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    # Plain values travel over gloo, so that they need no place on a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=COLLECTIVE_TIMEOUT)
    yield
    # Not after an error, which other ranks may know nothing of: they wait for this one in NCCL, and ending the group
    # would wait for them. This way the error is told, the process ends, and torchrun ends the others.
    dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The device, made the current one. A GPU without a number is this rank's own of the GPUs of its machine."""
    if device.type == "cuda" and device.index is None and world_size() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def data_parallel(network: nn.Module) -> nn.Module:
    """What to forward with, so that backward ends in the same gradient on all ranks: the mean of theirs.

    Buffers are not broadcast: each rank's norms remember their own mini-batches, which the first rank's would
    overwrite.
    """
    if world_size() == 1:
        return network
    # torch 2.15 warns of the second name, which earlier ones know alone.
    named = inspect.signature(DistributedDataParallel).parameters
    off: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers": False}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **off)  # or gradients lie there twice


def without_sync(forward: nn.Module) -> AbstractContextManager[None]:
    """Gradients stay on their ranks: for all mini-batches of a batch but the last, whose backward sums up."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


def all_gather(value: Value) -> list[Value]:
    """Every rank's value, in rank order, on every rank. Plain values and tensors on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Value) -> Value:
    """The first rank's value."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Each becomes its mean over the ranks, in place, in one message."""
    if world_size() == 1 or not tensors:
        return
    flat = all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors]))
    flat /= world_size()
    for tensor, mean in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def any_rank(*wishes: bool) -> tuple[bool, ...]:
    """For each, whether any rank wishes it: so that all of them do it, or none."""
    if world_size() == 1:
        return wishes
    votes = all_reduce_sum(torch.tensor(wishes, dtype=torch.int32))
    return tuple(bool(vote) for vote in votes.tolist())
