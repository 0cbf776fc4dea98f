"""The checkpoint: a trained network with everything it takes to use it and, in `last.pt`, to resume its training.

Files hold plain values and tensors only, so that they load with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_origin, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from utils.atomic_file import atomic_write
from utils.errors import UserError

FORMAT = 4
RESUMABLE_FROM = 3  # earlier formats hold weights that can be used, but no training that can be resumed


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeState:
    """What training needs to continue as if it had never stopped; only last.pt has it."""

    state: Mapping[str, Any]  # engine.training_state.training_state(), with the optimizer and all ranks
    log: Mapping[str, Any]  # engine.training_log.TrainingLog.state_dict(): the epoch that is not over
    subdivisions: int  # more than in the settings if memory ran out since

    def __post_init__(self) -> None:
        _check_types(self)
        if self.subdivisions < 1:
            raise ValueError(f"subdivisions is {self.subdivisions}")
        for name, kind in (("sum", Tensor), ("count", int), ("seconds", float)):
            if name in self.log and not isinstance(self.log[name], kind):
                raise TypeError(f"{name} of its log is of type {type(self.log[name]).__name__}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Weights, the network they belong to, and where their training stood.

    Defaults are what darknet's .weights files have. Raises TypeError or ValueError for a field of another kind.
    """

    cfg_name: str  # "yolov4-tiny"
    cfg_text: str
    input_hw: tuple[int, int]  # pixels
    letterbox: bool
    class_names: tuple[str, ...]
    norm: Mapping[str, Any]  # fields of models.norms.options.NormOptions
    weights: Mapping[str, Tensor]  # the averaged ones
    domains: tuple[str, ...] = ()  # names of the data sets that it was trained on, if they were several
    seen: int | None = None  # images that darknet trained on; None for a network trained here
    step: int = 0  # optimizer steps done
    epochs_done: int = 0
    train_images: int | None = None  # in the training split, which makes the length of an epoch
    best_ap: float = float("-inf")  # on the validation split, of all evaluations so far
    mini_batch: int | None = None  # images of one forward on one rank
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of options.TrainOptions, flat
    thresholds: Mapping[str, Any] = field(default_factory=dict)  # models.thresholds.Thresholds.to_json(), or nothing
    is_precise: bool = False  # the norms have precise statistics (--precise-bn)
    run_id: str = ""  # tells it from checkpoints of other runs; earlier versions wrote none
    training: ResumeState | None = None
    format: int = FORMAT  # of the file that this was read from

    def __post_init__(self) -> None:
        _check_types(self)
        if not (len(self.input_hw) == 2 and all(isinstance(side, int) and side > 0 for side in self.input_hw)):
            raise ValueError(f"input_hw is {self.input_hw}, not two positive integers")
        if self.step < 0 or self.epochs_done < 0:
            raise ValueError(f"step {self.step}, epochs_done {self.epochs_done}: must not be negative")
        if not all(isinstance(name, str) for name in self.class_names):
            raise TypeError("class_names are not all strings")
        if not all(isinstance(tensor, Tensor) for tensor in self.weights.values()):
            raise TypeError("weights are not all tensors")

    @property
    def is_darknet(self) -> bool:
        """Return whether the weights came from a .weights file."""
        return self.seen is not None

    @classmethod
    def from_file(cls, path: Path) -> Checkpoint:
        """Read what `to_file` or `to_safetensors` of this version or an earlier one wrote; tensors are on the CPU.

        Raises UserError if the file is missing, damaged, of another kind or of a newer format.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        try:
            content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        except _DamageError as error:
            raise UserError(f"{path}: is damaged ({error}); use another copy") from error
        except Exception as error:  # torch.load raises whatever the file's bytes happen to trigger
            raise UserError(f"{path}: not a checkpoint of this project, or damaged ({type(error).__name__})") from error
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise UserError(f"{path}: not a checkpoint of this project")
        if content["format"] > FORMAT:
            raise UserError(f"{path}: written by a newer version (format {content['format']}, known {FORMAT})")
        try:
            return cls._from_content(content)
        except (KeyError, TypeError, ValueError) as error:
            text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}: the checkpoint does not describe its network ({text})") from error

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> Checkpoint:
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        if "train_pictures" in content:  # format 3
            values["train_images"] = content["train_pictures"]
        for name in ("input_hw", "class_names"):
            values[name] = tuple(content[name])
        values["domains"] = tuple(content.get("domains", ()))
        for name in ("cfg_name", "cfg_text", "letterbox", "norm", "weights"):
            values[name] = content[name]
        training = values.pop("training", None)
        if training is not None and content["format"] >= RESUMABLE_FROM:
            if content["format"] == 3:
                training = {"state": training, "log": content["log"], "subdivisions": content["subdivisions"]}
            values["training"] = ResumeState(**training)
        return cls(**values)

    def to_file(self, path: Path) -> None:
        """Write atomically: the old file stays until the new one has been read back. OSError if the disk refuses."""
        content = _plain(self) | {"format": FORMAT, "training": self.training and _plain(self.training)}
        with atomic_write(path, verify=_verify) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's writer, when it closes the archive after a failed write
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def to_safetensors(self, path: Path) -> None:
        """Write without `training`, for others to read who need not trust a pickle. OSError if the disk refuses.

        What is not a tensor goes into the header: as json under `checkpoint`, with a checksum of all under `sha256`.
        """
        weights = {name: tensor.contiguous() for name, tensor in self.weights.items()}
        content = _plain(self) | {"format": FORMAT}
        text = json.dumps({name: value for name, value in content.items() if name not in ("weights", "training")})
        header = {"format": "pt", "checkpoint": text, "sha256": _checksum(text, weights)}
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(weights, header))


class _DamageError(Exception):
    """The content does not have the checksum that it was written with."""


def _check_types(record: object) -> None:
    for name, hint in get_type_hints(type(record)).items():
        kind = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
        if not isinstance(value := getattr(record, name), kind):
            raise TypeError(f"{name} is of type {type(value).__name__}")


def _plain(record: Checkpoint | ResumeState) -> dict[str, Any]:
    """Return the fields by name, without copying tensors."""
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _read_torch(path: Path) -> Any:
    _check_archive(path)  # torch does not compare checksums
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Any:
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        header = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = header.get("checkpoint", "{}")
    if header.get("sha256", digest := _checksum(text, weights)) != digest:  # earlier formats have none
        raise _DamageError("its checksum is wrong")
    return {**json.loads(text), "weights": weights}


def _checksum(text: str, weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise _DamageError(f"the checksum of {damaged} is wrong")
        # One that is marked as a folder is not read by torch, which then returns whatever is in the memory.
        if folders := [record.filename for record in archive.infolist() if record.external_attr]:
            raise _DamageError(f"the entry of {folders[0]} in its directory is wrong")


def _verify(path: Path) -> None:
    try:
        _check_archive(path)
    except (zipfile.BadZipFile, _DamageError) as error:
        raise OSError(f"does not read back as it was written: {error}") from error
