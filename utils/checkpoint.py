"""Checkpoints: plain values and tensors only, so that they load with `weights_only=True`.

One file holds what detection needs (cfg text, class names, norm, averaged weights) and, in `last.pt`, what
training needs to go on.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from utils.atomic_file import atomic_write
from utils.errors import UserError

FORMAT = 3
RESUMABLE_FROM = 3  # weights can be read from earlier formats, too


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """A reader sees the old file or the new, never half; the old one stays until the new one has been read back.

    OSError where the disk does not take it.
    """
    with atomic_write(path, verify=_verify) as file:
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
    with atomic_write(path) as file:
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
