"""Trained weights as the pages take them: a checkpoint of this project, or darknet's .weights with their cfg."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cfg.convolution import ConvSpec
from cfg.edit import with_values
from cfg.parse import did_you_mean
from cfg.plan import HERE, Plan, load_plan, parse_plan
from models.norms.domains import has_domains, plain_state
from models.norms.options import NormOptions, resolve_norm
from models.stored_network import make_checkpoint
from models.weights.published import PUBLISHED, find_weights
from models.weights.reader import read_header, read_weights
from utils.checkpoint import Checkpoint
from utils.console import line
from utils.errors import UserError
from utils.listing import read_lines

COCO_NAMES = HERE / "coco.names"  # as COCO spells them: "motorcycle", where darknet's own file says "motorbike"


def is_darknet(path: Path) -> bool:
    """Return whether a file is a .weights file, by its content, and not a checkpoint: a zip archive or .safetensors.

    Raises UserError if it is missing or neither.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint or .weights file{did_you_mean(path.name, tuple(PUBLISHED))}")
    if path.name.endswith((".ncnn.json", ".ncnn.param", ".ncnn.bin")):
        raise UserError(f"{path}: is ncnn's, for other programs: give the checkpoint, or export it to onnx or openvino")
    try:
        with open(path, "rb") as file:
            if path.suffix == ".safetensors" or file.read(2) == b"PK":
                return False
            file.seek(0)
            read_header(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {error.strerror}") from error
    return True


def read_trained(
    path: str, *, cfg: str | None, names: str | None, domain: str | None = None
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Read a whole detector. Returns it, and lines for the console about where darknet's weights and names come from.

    path: of a file, or a published name (`find_weights`). domain: of a checkpoint with several, the one whose norms it
    gets. Raises UserError for weights of a part of a network, for darknet's without a cfg, for a checkpoint with one,
    and if the domain is not there or not chosen.
    """
    path, cfg = find_weights(path, cfg)
    if is_darknet(Path(path)):
        checkpoint, report, more = read_darknet(path, cfg, names)
        return checkpoint, (line("weights", report), *more)
    if cfg is not None or names is not None:
        raise UserError(f"{path}: a checkpoint knows its network and its classes: leave --cfg and --names out")
    return of_domain(Checkpoint.from_file(Path(path)), domain, path=path), ()


def of_domain(checkpoint: Checkpoint, name: str | None, *, path: str) -> Checkpoint:
    """Return the checkpoint of a plain network that computes what this one does for a domain.

    Raises UserError, with the domains that there are, where it has none of this name, and for None where it matters.
    """
    is_own, known = has_domains(checkpoint.weights), ", ".join(checkpoint.domains)
    if name is None and is_own:
        raise UserError(f"{path}: has norms of its own for each of {known}: choose with --domain NAME")
    if name is not None and name not in checkpoint.domains:
        has = f"knows {known}" if known else "was trained on one data set"
        raise UserError(f"{path}: there is no domain '{name}', it {has}")
    if name is None or not is_own:
        return checkpoint
    return replace(
        checkpoint,
        norm={**checkpoint.norm, "domain_statistics": "shared", "domain_affine": "shared"},
        weights=plain_state(checkpoint.weights, checkpoint.domains.index(name)),
        domains=(),
        training=None,
    )


def read_darknet(
    path: str, cfg: str | None, names: str | None = None, *, whole: bool = True
) -> tuple[Checkpoint, str, tuple[str, ...]]:
    """Read a .weights file. Returns it, what was loaded, and lines for the console about names and the cfg.

    Without `names`, a file of the weights' name with .names is taken if there is one. `weights` lacks the layers that
    the file does not have; with `whole` that raises UserError.
    """
    if cfg is None:
        raise UserError(f"{path}: darknet's weights do not describe their network: name its cfg with --cfg")
    plan = _as_darknet_reads(load_plan(cfg))
    loaded = read_weights(Path(path), plan)
    if whole:
        if not loaded.is_complete:
            raise UserError(f"{path}: is not the whole network, only train.py can use it: {loaded.report}")
        if not plan.heads or plan.net.channels not in (1, 3):
            raise UserError(f"{plan.path}: is no detector of images, which has [yolo] layers, and channels=3 or 1")
    beside = Path(path).with_suffix(".names")
    given = Path(names) if names is not None else beside if beside.is_file() else None
    classes, origin = class_names(plan, given)
    is_cmbn = any(isinstance(node.spec, ConvSpec) and node.spec.batch_normalize == 2 for node in plan.nodes)
    norm = resolve_norm(NormOptions(norm="cmbn" if is_cmbn else "bn"))
    network = make_checkpoint(plan, norm, loaded.state, class_names=classes, letterbox=plan.net.letter_box)
    settings = {"batch_size": plan.net.batch, "subdivisions": plan.net.subdivisions}
    checkpoint = replace(network, seen=loaded.header.seen, settings=settings)
    warnings = (f"warning: {warning}" for warning in plan.warnings)
    return checkpoint, f"{path}: {loaded.report}", (line("names", origin), *warnings)


def _as_darknet_reads(plan: Plan) -> Plan:
    """Return the plan without norm= in its cfg, which darknet does not know: its weights are of batch norm."""
    own = {node.line: {"norm": None} for node in plan.nodes if isinstance(node.spec, ConvSpec) and node.spec.norm}
    return parse_plan(with_values(plan.source_text, own), path=plan.path) if own else plan


def class_names(plan: Plan, file: Path | None = None) -> tuple[tuple[str, ...], str]:
    """Return one name per class, and where they come from: `file` (one name a line), or what the count suggests.

    Raises UserError if `file` has another number of names than the plan has classes.
    """
    if file is not None:
        names = read_lines(file)
        if len(names) != plan.classes:
            raise UserError(f"{file}: has {len(names)} names, {plan.path} has {plan.classes} classes")
        return tuple(names), f"from {file}"
    coco = read_lines(COCO_NAMES)
    if len(coco) == plan.classes:
        return tuple(coco), "COCO's, because there are 80 classes; --names FILE gives others"
    return made_up_names(plan.classes), "class 0, class 1 ...; --names FILE gives others"


def made_up_names(classes: int) -> tuple[str, ...]:
    """Return "class 0", "class 1" ..., as for a .data file without names."""
    return tuple(f"class {label}" for label in range(classes))
