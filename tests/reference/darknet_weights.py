"""A .weights file read one value after the other, from nothing but the cfg's text: slow, and without models/ or cfg/.

After darknet's parser.c: no names, no shapes, no counts; layers in file order until the file ends.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tests.reference.darknet_cfg import read_sections

NORM = ("scales", "rolling_mean", "rolling_variance")


class Refused(Exception):
    """The file cannot be of this network. `layer` is the first that cannot be read, None for the file as a whole."""

    def __init__(self, layer: int | None) -> None:
        super().__init__()
        self.layer = layer


@dataclass(frozen=True)
class Array:
    word: str
    size: int
    is_read: bool


def layers_of(text: str) -> Iterator[tuple[int, list[Array]]]:
    """Index and arrays of each layer, also of those that have none."""
    (_, net), *layers = read_sections(text)
    channels: list[int] = []
    for index, (name, keys) in enumerate(layers):
        before = channels[-1] if channels else int(net.get("channels", 3))
        after, arrays = before, []
        if name == "convolutional":
            after, size, groups = (int(keys.get(key, 1)) for key in ("filters", "size", "groups"))
            load, scales = (keys.get(key, "0") == "0" for key in ("dontload", "dontloadscales"))
            arrays = [Array("biases", after, load)]
            if keys.get("batch_normalize", "0") != "0":
                arrays += [Array(word, after, load and scales) for word in NORM]
            arrays.append(Array("weights", after * (before // groups) * size * size, load))
        elif name == "route":
            after = sum(channels[int(i) % index] // int(keys.get("groups", 1)) for i in keys["layers"].split(","))
        elif name == "shortcut":
            per_input = {"none": 0, "per_feature": 1, "per_channel": before}[keys.get("weights_type", "none")]
            if per_input:
                arrays = [Array("weights", per_input * (1 + len(keys["from"].split(","))), True)]
        elif name == "reorg3d":
            after = before * int(keys["stride"]) ** 2
        elif name == "scale_channels":
            after = channels[int(keys["from"]) % index]
        channels.append(after)
        yield index, arrays


def read(text: str, raw: bytes) -> tuple[int, dict[tuple[int, str], list[float]]]:
    """Images seen, and the values by layer and darknet's word for them; layers behind the file's end are absent."""
    if len(raw) < 12:
        raise Refused(None)
    major, minor, revision = struct.unpack("<iii", raw[:12])
    if major != 0 or minor not in (1, 2) or not 0 <= revision < 100:
        raise Refused(None)
    position = 20 if minor == 2 else 16
    if len(raw) < position:
        raise Refused(None)
    seen = int.from_bytes(raw[12:position], "little")
    if seen > 2**48 or len(raw) == position:
        raise Refused(None)
    values: dict[tuple[int, str], list[float]] = {}
    last = None
    for index, arrays in layers_of(text):
        arrays = [array for array in arrays if array.is_read]
        if arrays and position == len(raw):
            return seen, values
        for array in arrays:
            last = index
            values[index, array.word] = row = []
            for _ in range(array.size):
                if position + 4 > len(raw):
                    raise Refused(index)
                (value,) = struct.unpack_from("<f", raw, position)
                if not math.isfinite(value) or (array.word == "rolling_variance" and value < 0):
                    raise Refused(index)
                row.append(value)
                position += 4
    if position != len(raw):
        raise Refused(last)
    return seen, values


def header(seen: int = 0, version: tuple[int, int, int] = (0, 2, 5)) -> bytes:
    return struct.pack("<iiiQ" if version[1] >= 2 else "<iiiI", *version, seen)


def random_file(text: str, *, seed: int = 0, seen: int = 0, skip_unread: bool = False) -> bytes:
    """A file for the cfg, as darknet writes it; with skip_unread, as darknet reads it for this very cfg."""
    draw = random.Random(seed)
    raw = [header(seen)]
    for _, arrays in layers_of(text):
        for array in arrays:
            low, high = {"rolling_variance": (0.5, 1.5), "scales": (0.75, 1.25)}.get(array.word, (-0.2, 0.2))
            if array.is_read or not skip_unread:
                raw.append(struct.pack(f"<{array.size}f", *(draw.uniform(low, high) for _ in range(array.size))))
    return b"".join(raw)
