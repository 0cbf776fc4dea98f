"""Reading a darknet .weights file into the state dict of a Network: every byte is accounted for, or it is refused.

Source: darknet `parser.c`, load_weights_upto. darknet itself reads past the end of a short file and ignores the rest
of a long one; here only a file that ends between two layers is taken as a part of the network, as
`darknet partial` makes them (yolov4.conv.137).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from cfg.parse import CfgError
from cfg.plan import Plan, parse_plan
from models.weights.layout import FRESH_SCALES, StoredArray, StoredLayer, place, stored_layers
from utils.errors import UserError

MAX_SEEN = 2**48  # images; more means a damaged header
MAX_REVISION = 99

# A norm averages its first batches with equal weights (models/norms/batch_stat.py): with fewer batches, the first one
# would replace the loaded statistics.
SETTLED_BATCHES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """Version of the format, and the number of images trained on. The default version is what darknet writes."""

    major: int = 0
    minor: int = 2
    revision: int = 5
    seen: int = 0

    @property
    def size_bytes(self) -> int:
        return 20 if self.minor >= 2 else 16

    def to_bytes(self) -> bytes:
        assert self.minor >= 2
        return struct.pack("<3iQ", self.major, self.minor, self.revision, self.seen)


@dataclass(frozen=True, kw_only=True, slots=True)
class DarknetWeights:
    """Content of a .weights file. state: by names of a Network with batch norm, without layers that were not loaded.

    report: "loaded 110 of 110 convolutions, 0 bytes left", and what was not loaded.
    """

    header: Header
    state: dict[str, Tensor]
    report: str
    is_complete: bool


def read_weights(path: Path, plan: Plan) -> DarknetWeights:
    """Read a .weights file of the plan's network.

    Raises UserError, naming the layer, if it ends inside a layer, is too long, or holds impossible values.
    """
    layers = stored_layers(plan)
    try:
        with open(path, "rb") as file:
            header = read_header(path, file)
            size_bytes = os.fstat(file.fileno()).st_size - header.size_bytes
            present = _layers_present(path, plan, layers, size_bytes)
            state: dict[str, Tensor] = {}
            for layer in layers[:present]:
                state |= _read_layer(path, plan, layer, file)
            left_bytes = header.size_bytes + size_bytes - file.tell()
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {error.strerror}") from error
    return DarknetWeights(
        header=header,
        state=state,
        report=_report(plan, layers, present, left_bytes),
        is_complete=present == len(layers) and all(layer.loaded == layer.arrays for layer in layers),
    )


def read_header(path: Path, file: BinaryIO) -> Header:
    """Read the header and leave the file at the first layer. Raises UserError for an unknown version."""
    raw = file.read(12)
    version = struct.unpack("<3i", raw) if len(raw) == 12 else ()
    if version[:2] not in ((0, 1), (0, 2)) or not 0 <= version[2] <= MAX_REVISION:
        reason = f"version {'.'.join(map(str, version))} is neither 0.1 nor 0.2" if version else "it is too short"
        raise UserError(f"{path}: neither a checkpoint of this project nor a darknet .weights file: {reason}")
    major, minor, revision = version
    layout = "<Q" if minor >= 2 else "<I"
    raw = file.read(struct.calcsize(layout))
    if len(raw) < struct.calcsize(layout):
        raise UserError(f"{path}: ends inside the header of a darknet .weights file")
    (seen,) = struct.unpack(layout, raw)
    if seen > MAX_SEEN:
        raise UserError(f"{path}: its header is damaged: {seen} images seen")
    return Header(major=major, minor=minor, revision=revision, seen=seen)


def _layers_present(path: Path, plan: Plan, layers: Sequence[StoredLayer], size_bytes: int) -> int:
    """Return how many of `layers` are in a file of `size_bytes` after its header. Raises UserError if one is cut."""
    ends = list(accumulate(layer.loaded_bytes for layer in layers))
    if not ends or ends[-1] == 0:
        raise UserError(f"{plan.path}: has no layer that reads anything from {path}")
    if size_bytes == 0:
        raise UserError(f"{path}: a header of a darknet .weights file and nothing behind it")
    present = sum(end <= size_bytes for end in ends)
    if size_bytes > ends[-1]:
        left = size_bytes - ends[-1]
        wrong = f"{left:,} bytes are left behind {place(plan, layers[-1].node)}, the last with weights"
    elif present and ends[present - 1] == size_bytes:
        return present
    else:
        missing = ends[present] - size_bytes
        wrong = f"it ends inside {place(plan, layers[present].node)}, {missing:,} bytes before that layer's end"
    raise UserError(f"{path}: {wrong}: a damaged file, or one of another network{_class_hint(plan, size_bytes)}")


def _class_hint(plan: Plan, size_bytes: int) -> str:
    """Return a hint if the file's size fits another number of classes, the most frequent mistake in a cfg."""
    try:
        plans = [parse_plan(plan.source_text, path=plan.path, classes=classes) for classes in (1, 2)]
    except CfgError:  # heads that cannot be re-sized
        return ""
    one, two = (sum(layer.loaded_bytes for layer in stored_layers(each)) for each in plans)
    if two == one:  # no heads
        return ""
    more, rest = divmod(size_bytes - one, two - one)
    classes = 1 + more
    return f" (it would fit with classes={classes})" if not rest and 1 <= classes <= 10_000 else ""


def _read_layer(path: Path, plan: Plan, layer: StoredLayer, file: BinaryIO) -> dict[str, Tensor]:
    state = {array.name: torch.from_numpy(_read_array(path, plan, layer, array, file)) for array in layer.loaded}
    norm = [array for array in layer.arrays if array.word in FRESH_SCALES]
    if state and norm:
        state = {array.name: torch.full(array.shape, FRESH_SCALES[array.word]) for array in norm} | state
        batches = SETTLED_BATCHES if layer.loaded == layer.arrays else 0
        state[f"layers.{layer.node.index}.norm.num_batches_tracked"] = torch.tensor(batches)
    return state


def _read_array(path: Path, plan: Plan, layer: StoredLayer, array: StoredArray, file: BinaryIO) -> np.ndarray:
    values = np.fromfile(file, "<f4", array.size).astype(np.float32, copy=False)
    if len(values) < array.size:
        raise UserError(f"{path}: became shorter while it was read")
    if fault := array.fault_of(values):
        raise UserError(f"{path}: {place(plan, layer.node)}: {fault}: a damaged file, or one of another network")
    return values.reshape(array.shape)


def _report(plan: Plan, layers: Sequence[StoredLayer], present: int, left_bytes: int) -> str:
    loaded = [layer for layer in layers[:present] if layer.loaded]
    counts = []
    for kind, noun in (("convolutional", "convolutions"), ("shortcut", "weighted shortcuts")):
        total = sum(layer.node.spec.kind == kind for layer in layers)
        if total:
            counts.append(f"{sum(layer.node.spec.kind == kind for layer in loaded)} of {total} {noun}")
    notes = [f"loaded {' and '.join(counts)}, {left_bytes} bytes left"]
    if present < len(layers):
        notes.append(
            f"the file ends before {place(plan, layers[present].node)}: it and all after it are re-initialized"
        )
    for key, skipped in (
        ("dontload", [layer for layer in layers[:present] if not layer.loaded]),
        ("dontloadscales", [layer for layer in loaded if layer.loaded != layer.arrays]),
    ):
        if skipped:
            notes.append(f"{key}=1 in layers {', '.join(str(layer.node.index) for layer in skipped)}")
    return "; ".join(notes)
