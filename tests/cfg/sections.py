"""Reading one section in a test."""

from __future__ import annotations

from cfg.layers import read_layer
from cfg.parse import parse_sections
from cfg.spec import LayerSpec


def read(text: str) -> LayerSpec:
    """The spec of the first section of `text`, a file named a.cfg."""
    return read_layer(parse_sections(text, path="a.cfg")[0])


def notes(text: str) -> list[str]:
    """What reading the first section of `text` says, unknown keys included."""
    section = parse_sections(text, path="a.cfg")[0]
    read_layer(section)
    return section.warnings(set())


def window_starts(side: int, before: int, after: int, window: int, stride: int) -> int:
    """Counts by walking: a window may start wherever it still ends inside the padded side."""
    count, start = 0, -before
    while start + window <= side + after:
        count, start = count + 1, start + stride
    return count
