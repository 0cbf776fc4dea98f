"""Memory that a training holds besides its weights, also where no GPU counts its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.amp import MixedPrecision
from engine.build import make_network
from engine.job import Job
from models.norms.running_stats import has_running_statistics
from utils.clock import BatchClock
from utils.environment import pick_device

Storages = dict[int, int]  # address -> bytes: tensors that share one are counted once


def memory_of_batch(job: Job, *, step: int) -> dict[str, Any]:
    """Return the memory of the batch of this step in MB; of the last one, it is that after any burn-in.

    On CUDA the peak of allocations above what was allocated before. On a CPU, which has no such counter, what autograd
    saves for the backward of a mini-batch, and what the norms hold then beyond batch norm's own state.
    """
    device, plan = pick_device(job.options.device), job.plan
    autocast = MixedPrecision(job.options.optim.amp, device).autocast
    images = torch.rand(job.mini_batch, plan.net.channels, *plan.net.input_hw, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    network = make_network(job.options, plan, device).train()
    most = 0
    for pixels in BatchClock(network, step=step).minibatches([images] * job.forwards):
        with autocast():
            if device.type == "cuda":
                torch.autograd.backward([head.logits.square().mean() for head in network(pixels)])
            else:
                saved = saved_storages(partial(network, pixels), network)
                most = max(most, sum((saved | state_storages(network)).values()))
    if device.type == "cuda":
        most, what = torch.cuda.max_memory_allocated(device) - before, "peak allocated by a batch"
    else:
        buffers = (norm.get_buffer("running_mean") for norm in network.modules() if has_running_statistics(norm))
        most -= 2 * 4 * sum(buffer.numel() for buffer in buffers)  # running mean and variance
        what = "saved for a mini-batch's backward, and held by the norms"
    return {"memory_MB": round(most / 2**20, 2), "memory_of": what}


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
