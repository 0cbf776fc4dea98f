"""Checkpoints: plain values and tensors only, so that they load with `weights_only=True`.

One file holds what detection needs (cfg text, class names, norm, averaged weights) and, in `last.pt`, what
training needs to go on.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from utils import ranks
from utils.amp import MixedPrecision
from utils.clock import BatchAware, BatchClock
from utils.ema import WeightAverage
from utils.errors import UserError
from utils.seed import random_state, set_random_state
from utils.whole_file import whole_file

FORMAT = 3
RESUMABLE_FROM = 3  # weights can be read from earlier formats, too


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """A reader sees the old file or the new, never half; the old one stays until the new one has been read back.

    OSError where the disk does not take it.
    """
    with whole_file(path, verify=_verify) as file:
        try:
            torch.save({"format": FORMAT, **content}, file)
        except RuntimeError as error:  # torch's writer, when it closes the archive after a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write_weights(path: Path, content: dict[str, Any]) -> None:
    """A checkpoint without its training as safetensors: for others to read, who need not trust a pickle.

    What is not a tensor goes into the header as json, under `checkpoint`. OSError where the disk does not take it.
    """
    weights = {name: tensor.contiguous() for name, tensor in content["weights"].items()}
    rest = {name: value for name, value in content.items() if name not in ("weights", "training", "log")}
    header = {"format": "pt", "checkpoint": json.dumps({"format": FORMAT, **rest})}
    with whole_file(path) as file:
        file.write(safetensors.torch.save(weights, header))


def _read_weights(path: Path) -> Any:
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        content = json.loads((file.metadata() or {}).get("checkpoint", "{}"))
        return {**content, "weights": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def _verify(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise OSError(f"{damaged} was not written as it should be")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """On the CPU, of write_checkpoint or write_weights. UserError for a missing file, another kind, a newer format."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        is_safetensors = path.suffix == ".safetensors"
        content = _read_weights(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what the file's bytes happen to trip over
        raise UserError(f"{path}: not a checkpoint of this project, or damaged ({type(error).__name__})") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise UserError(f"{path}: not a checkpoint of this project")
    if content["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {content['format']}, known {FORMAT})")
    return content


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
            "ranks": ranks.gathered(own),
        }

    def load_state_dict(self, state: dict[str, Any], *, weights: dict[str, Tensor]) -> None:
        """Where the job had another number of ranks, each goes on with what the first one's norms remember."""
        self.network.load_state_dict(state["network"])
        self.average.model.load_state_dict(weights)
        own = state["ranks"][ranks.rank() if len(state["ranks"]) == ranks.count() else 0]
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
        if self.precision.scale() != before:
            for module in self.network.modules():
                if isinstance(module, BatchAware):
                    module.loss_rescaled(self.precision.scale() / before)


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
