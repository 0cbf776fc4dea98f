"""Checkpoints: plain values and tensors only, so that they load with `weights_only=True`.

One file holds what detection needs (cfg text, class names, norm, averaged weights) and, in `last.pt`, what
training needs to go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.amp import MixedPrecision
from utils.clock import BatchAware, BatchClock
from utils.ema import WeightAverage
from utils.errors import UserError
from utils.whole_file import whole_file

FORMAT = 1


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """A reader sees the old file or the new, never half."""
    with whole_file(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """On the CPU. UserError for a missing file, one of another kind, or of a newer format."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what the file's bytes happen to trip over
        raise UserError(f"{path}: not a checkpoint of this project, or damaged ({type(error).__name__})") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise UserError(f"{path}: not a checkpoint of this project")
    if content["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {content['format']}, known {FORMAT})")
    return content


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Everything that changes while training: together they make a run go on as if it had never stopped."""

    network: nn.Module
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    precision: MixedPrecision
    clock: BatchClock

    def state_dict(self) -> dict[str, Any]:
        """At a batch boundary. The averaged weights are saved apart, under `weights`: detection wants only them."""
        return {
            "network": self.network.state_dict(),
            "norm_histories": norm_histories(self.network),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "step": self.clock.step,
        }

    def load_state_dict(self, state: dict[str, Any], *, weights: dict[str, Tensor]) -> None:
        self.network.load_state_dict(state["network"])
        load_norm_histories(self.network, state["norm_histories"])
        self.average.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty when the run did not scale its losses
            self.precision.scaler.load_state_dict(state["scaler"])
        self.clock.step = state["step"]


def norm_histories(model: nn.Module) -> dict[str, Tensor]:
    """What BatchAware modules remember across batches and state dicts leave out, by buffer name."""
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchAware) and isinstance(module, nn.Module):
            persistent = set(module.state_dict())
            for key, buffer in module.named_buffers():
                if key not in persistent and buffer.numel():
                    state[f"{name}.{key}"] = buffer
    return state


@torch.no_grad()
def load_norm_histories(model: nn.Module, histories: dict[str, Tensor]) -> None:
    """In place; buffers that were not allocated yet take the saved shape."""
    buffers = dict(model.named_buffers())
    for name, saved in histories.items():
        buffers[name].resize_(saved.shape).copy_(saved)


def load_matching(model: nn.Module, state: dict[str, Tensor]) -> tuple[int, list[str]]:
    """Load every layer that fits as a whole -> how many, and the names of those that did not.

    For fine-tuning: another class count changes the heads' shapes, and they start fresh.
    """
    own = model.state_dict()
    layers = {name.rpartition(".")[0] for name in own}
    unfit = {n.rpartition(".")[0] for n, t in own.items() if n not in state or state[n].shape != t.shape}
    fitting = {n: t for n, t in state.items() if n in own and n.rpartition(".")[0] not in unfit}
    model.load_state_dict(fitting, strict=False)
    return len(layers - unfit), sorted(unfit)
