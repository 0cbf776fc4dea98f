"""The state of a training, saved together and restored together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.ema import ModelEMA, persistent_buffers
from engine.step import TrainStep
from utils import ranks
from utils.clock import BatchAware
from utils.seed import random_state, set_random_state


def training_state(step: TrainStep, ema: ModelEMA) -> dict[str, Any]:
    """Return everything that changes in a training: restored, the run continues as if it had never stopped.

    Call it between batches, on all ranks. The EMA weights are not in it: the checkpoint has them.
    """
    own = {  # ranks have equal parameters, but statistics of their own
        "buffers": {name: buffer.cpu() for name, buffer in persistent_buffers(step.network).items()},
        "averaged_buffers": {name: buffer.cpu() for name, buffer in persistent_buffers(ema.model).items()},
        "norm_histories": norm_histories(step.network),
        "random": random_state(),
    }
    return {
        "network": step.network.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "scaler": step.precision.scaler.state_dict(),
        "step": step.clock.step,
        "ranks": ranks.all_gather(own),
    }


def restore(step: TrainStep, ema: ModelEMA, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Load a `training_state` and the EMA weights.

    If the world size has changed, every rank takes the statistics and histories of rank 0.
    """
    own = state["ranks"][ranks.rank() if len(state["ranks"]) == ranks.world_size() else 0]
    step.network.load_state_dict({**state["network"], **own["buffers"]})
    ema.model.load_state_dict({**weights, **own["averaged_buffers"]})
    load_norm_histories(step.network, own["norm_histories"])
    _load_optimizer(step.optimizer, state["optimizer"])
    if state["scaler"]:  # empty when the run did not scale its losses
        step.precision.scaler.load_state_dict(state["scaler"])
    change = step.precision.scaler.get_scale() / state["scaler"].get("scale", 1.0)
    if change != 1:  # --resume may change --amp
        for module in step.network.modules():
            if isinstance(module, BatchAware):
                module.loss_rescaled(change)
    step.clock.step = state["step"]
    set_random_state(own["random"])


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what it has of each parameter, and the last rate; its settings stay.

    ValueError for what is not of a parameter's shape.
    """
    loaded = ("params", "lr")
    own = [{name: value for name, value in group.items() if name not in loaded} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.shape not in ((), parameter.shape):
                raise ValueError(f"{name} of the optimizer is not of the shape {tuple(parameter.shape)}")


def norm_histories(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that state dicts leave out, by name, on the CPU."""
    persistent = model.state_dict()
    return {name: t.cpu() for name, t in model.named_buffers() if name not in persistent}


@torch.no_grad()
def load_norm_histories(model: nn.Module, histories: dict[str, Tensor]) -> None:
    """Copy in place; buffers take the saved shape, which is empty before they are allocated."""
    buffers = dict(model.named_buffers())
    for name, saved in histories.items():
        buffers[name].resize_(saved.shape).copy_(saved)
