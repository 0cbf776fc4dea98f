"""What changes while training, saved together and put back together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.amp import MixedPrecision
from engine.ema import WeightAverage
from utils import ranks
from utils.clock import BatchAware, BatchClock
from utils.seed import random_state, set_random_state


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """What changes while training: together they make a run go on as if it had never stopped."""

    network: nn.Module
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    precision: MixedPrecision
    clock: BatchClock

    def state_dict(self) -> dict[str, Any]:
        """At a batch boundary, by all ranks. The averaged weights are saved apart, under `weights`."""
        own = {
            "buffers": buffers_of(self.network),
            "averaged_buffers": buffers_of(self.average.model),
            "norm_histories": norm_histories(self.network),
            "random": random_state(),
        }
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "step": self.clock.step,
            "ranks": ranks.all_gather(own),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, weights: Mapping[str, Tensor]) -> None:
        """Where the job had another number of ranks, each goes on with what the first one's norms remember."""
        self.network.load_state_dict(state["network"])
        self.average.model.load_state_dict(weights)
        own = state["ranks"][ranks.rank() if len(state["ranks"]) == ranks.world_size() else 0]
        self.network.load_state_dict(own["buffers"], strict=False)
        self.average.model.load_state_dict(own["averaged_buffers"], strict=False)
        load_norm_histories(self.network, own["norm_histories"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty when the run did not scale its losses
            self.precision.scaler.load_state_dict(state["scaler"])
        self._rescale_histories(before=state["scaler"].get("scale", 1.0))
        self.clock.step = state["step"]
        set_random_state(own["random"])

    def _rescale_histories(self, *, before: float) -> None:
        """--resume may be told another --amp."""
        if self.precision.loss_scale() != before:
            for module in self.network.modules():
                if isinstance(module, BatchAware):
                    module.loss_rescaled(self.precision.loss_scale() / before)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Those of its state dict, on the CPU: ranks share parameters, but not statistics."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor.cpu() for name, tensor in model.state_dict().items() if name not in parameters}


def norm_histories(model: nn.Module) -> dict[str, Tensor]:
    """What BatchAware modules remember across batches and state dicts leave out, by buffer name; on the CPU."""
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchAware) and isinstance(module, nn.Module):
            persistent = set(module.state_dict())
            for key, buffer in module.named_buffers():
                if key not in persistent and buffer.numel():
                    state[f"{name}.{key}"] = buffer.cpu()
    return state


@torch.no_grad()
def load_norm_histories(model: nn.Module, histories: dict[str, Tensor]) -> None:
    """In place; buffers that were not allocated yet take the saved shape."""
    buffers = dict(model.named_buffers())
    for name, saved in histories.items():
        buffers[name].resize_(saved.shape).copy_(saved)
