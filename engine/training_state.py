"""The state of a training, saved together and restored together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.amp import MixedPrecision
from engine.ema import WeightAverage
from models.network import Network
from utils import ranks
from utils.clock import BatchAware, BatchClock
from utils.seed import random_state, set_random_state


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Everything that changes in a training: with it restored, the run continues as if it had never stopped."""

    network: Network
    average: WeightAverage[Network]
    optimizer: torch.optim.Optimizer
    precision: MixedPrecision
    clock: BatchClock

    def state_dict(self) -> dict[str, Any]:
        """Call it between batches, on all ranks. The averaged weights are not in it: the checkpoint has them."""
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
        """Restore. If the world size has changed, every rank takes the statistics and histories of rank 0."""
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
        """Adapt remembered gradients, because --amp may be changed by --resume."""
        if self.precision.loss_scale() != before:
            for module in self.network.modules():
                if isinstance(module, BatchAware):
                    module.loss_rescaled(self.precision.loss_scale() / before)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers, on the CPU: ranks have equal parameters, but statistics of their own."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor.cpu() for name, tensor in model.state_dict().items() if name not in parameters}


def norm_histories(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of BatchAware modules that state dicts leave out, by name, on the CPU."""
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
    """Copy in place; buffers that are not allocated yet take the saved shape."""
    buffers = dict(model.named_buffers())
    for name, saved in histories.items():
        buffers[name].resize_(saved.shape).copy_(saved)
