"""Conversion of a checkpoint to darknet's three files: .weights, and the .cfg and .names that belong to it."""

from __future__ import annotations

from pathlib import Path

from cfg.convolution import ConvSpec
from cfg.edit import with_values
from cfg.parse import parse_sections
from cfg.plan import parse_plan
from models.stored_network import build_network
from models.weights.writer import write_weights
from utils.atomic_file import atomic_write
from utils.checkpoint import Checkpoint
from utils.errors import UserError


def write_darknet(path: Path, checkpoint: Checkpoint, *, source: str) -> tuple[Path, Path, Path]:
    """Write the weights to `path`, the other two beside them. Returns all three paths.

    source: names the checkpoint in messages. Raises UserError if a file already exists, and as `build_network` and
    `write_weights`.
    """
    files = (path, path.with_suffix(".cfg"), path.with_suffix(".names"))
    for file in files:
        if file.exists() or files.count(file) > 1:
            raise UserError(f"{file}: already exists, or would be written twice: choose another name")
    # As darknet counts: a training from a .weights file starts with image 0, as darknet's does with -clear.
    trained_on = checkpoint.step * int(checkpoint.settings.get("batch_size", 0))
    seen = trained_on if checkpoint.seen is None else checkpoint.seen
    write_weights(path, build_network(checkpoint, path=source), seen=seen)
    names = "".join(f"{name}\n" for name in checkpoint.class_names)
    for file, text in zip(files[1:], (cfg_text(checkpoint), names), strict=True):
        with atomic_write(file) as out:
            out.write(text.encode())
    return files


def cfg_text(checkpoint: Checkpoint) -> str:
    """Return the checkpoint's cfg with the classes, input size and letterbox that it was trained with.

    dontload and dontloadscales become 0: the .weights file beside it holds every layer.
    """
    text, (height, width), path = checkpoint.cfg_text, checkpoint.input_hw, checkpoint.cfg_name + ".cfg"
    plan = parse_plan(text, path=path, classes=len(checkpoint.class_names), input_hw=(height, width))
    changed: dict[int, dict[str, object]] = {node.line: {} for node in plan.nodes}
    for node in plan.nodes:
        if isinstance(node.spec, ConvSpec):
            changed[node.line] = {key: 0 for key in ("dontload", "dontloadscales") if getattr(node.spec, key)}
    for index, spec in zip(plan.heads, plan.head_specs, strict=True):
        changed[plan.nodes[index - 1].line]["filters"] = spec.channels
        changed[plan.nodes[index].line]["classes"] = spec.classes
        if not spec.counters_per_class:  # they are the cfg's, for its own classes
            changed[plan.nodes[index].line]["counters_per_class"] = None
    net: dict[str, object] = {"width": width, "height": height}
    if checkpoint.letterbox != plan.net.letter_box:
        net["letter_box"] = int(checkpoint.letterbox)
    return with_values(text, {**changed, parse_sections(text, path=path)[0].line: net})
