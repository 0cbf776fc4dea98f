"""Trained weights as the pages take them: a checkpoint of this project, or darknet's .weights with their cfg."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cfg.convolution import ConvSpec
from cfg.plan import Plan, load_plan
from models.detector import make_checkpoint
from models.norms.table import NormOptions, resolve_norm
from models.weights.class_names import class_names
from models.weights.reader import read_header, read_weights
from utils.checkpoint import Checkpoint
from utils.errors import UserError


def is_darknet(path: Path) -> bool:
    """Whether it is a .weights file and not a checkpoint, by its content: a checkpoint is a zip archive, or it is
    called .safetensors.

    UserError for a file that is not there, or is neither.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint or .weights file")
    try:
        with open(path, "rb") as file:
            if path.suffix == ".safetensors" or file.read(2) == b"PK":
                return False
            file.seek(0)
            read_header(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {error.strerror}") from error
    return True


def read_trained(path: str, *, cfg: str | None, names: str | None) -> tuple[Checkpoint, tuple[str, ...]]:
    """A detector: content as of a checkpoint, and lines that say where darknet's weights and names are from.

    UserError for weights that are not a whole detector, for darknet's without a cfg, and for a checkpoint with one.
    """
    if is_darknet(Path(path)):
        return read_darknet(path, cfg, names)
    if cfg is not None or names is not None:
        raise UserError(f"{path}: a checkpoint knows its network and its classes: leave --cfg and --names out")
    return Checkpoint.from_file(Path(path)), ()


def read_darknet(
    path: str, cfg: str | None, names: str | None = None, *, whole: bool = True
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The same of a .weights file; its `weights` lack the layers that start fresh.

    UserError where there are such and a `whole` detector is wanted.
    """
    if cfg is None:
        raise UserError(f"{path}: darknet's weights do not say of what network they are: name its cfg with --cfg")
    plan = load_plan(cfg)
    loaded = read_weights(Path(path), plan)
    if whole:
        if not loaded.is_complete:
            raise UserError(f"{path}: is not the whole network, only train.py can use it: {loaded.report}")
        if not plan.heads or plan.net.channels != 3:
            raise UserError(f"{plan.path}: is no detector of images, which has [yolo] layers and channels=3")
    named, origin = class_names(plan, None if names is None else Path(names))
    described = make_checkpoint(plan, _norm_of(plan), loaded.state, class_names=named, letterbox=plan.net.letter_box)
    settings = {"batch_size": plan.net.batch, "subdivisions": plan.net.subdivisions}
    checkpoint = replace(described, seen=loaded.header.seen, settings=settings)
    warnings = (f"warning: {warning}" for warning in plan.warnings)
    return checkpoint, (f"weights   {path}: {loaded.report}", f"names     {origin}", *warnings)


def _norm_of(plan: Plan) -> NormOptions:
    is_cmbn = any(isinstance(node.spec, ConvSpec) and node.spec.batch_normalize == 2 for node in plan.nodes)
    return resolve_norm(NormOptions(norm="cmbn" if is_cmbn else "bn"))
