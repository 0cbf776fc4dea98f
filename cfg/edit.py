"""The text of a cfg with some of its values changed, and all else, comments too, as it was."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cfg.parse import parse_sections

_LINE = re.compile(r"(?P<before>[^=]*=[ \t]*).*?(?P<after>[ \t]*(#.*)?\r?)")


def with_values(text: str, changes: Mapping[int, Mapping[str, object]]) -> str:
    """changes: line of a section's header, counted from 1 -> key -> new value. A key that is absent is added."""
    lines = text.split("\n")
    for section in parse_sections(text, path="cfg"):
        for key, value in changes.get(section.line, {}).items():
            entry = section.entries.get(key)
            if entry is None:
                end = "\r" * lines[section.line - 1].endswith("\r")
                lines[section.line - 1] += f"\n{key}={value}{end}"
            elif entry.value != str(value):
                line = _LINE.fullmatch(lines[entry.line - 1])
                assert line is not None
                lines[entry.line - 1] = f"{line['before']}{value}{line['after']}"
    return "\n".join(lines)
