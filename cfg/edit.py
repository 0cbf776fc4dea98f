"""Changing values in the text of a cfg; everything else, comments too, stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cfg.parse import key_of, parse_sections

_LINE = re.compile(r"(?P<before>[^=]*=[ \t]*).*?(?P<after>[ \t]*(#.*)?\r?)")


def with_values(text: str, changes: Mapping[int, Mapping[str, object]]) -> str:
    """Return the text with new values. A key that is absent is added; None turns the key's lines into comments.

    changes: line of a section's header, counted from 1 -> key -> value.
    """
    lines = text.split("\n")
    sections = parse_sections(text, path="cfg")
    ends = [*(section.line - 1 for section in sections[1:]), len(lines)]
    for section, section_end in zip(sections, ends, strict=True):
        for key, value in changes.get(section.line, {}).items():
            entry = section.entries.get(key)
            if value is None:
                # Every line with this key, or darknet would read the next one.
                for index in range(section.line, section_end):
                    if key_of(lines[index]) == key:
                        lines[index] = f"# {lines[index]}"
            elif entry is None:
                end = "\r" * lines[section.line - 1].endswith("\r")
                lines[section.line - 1] += f"\n{key}={value}{end}"
            elif entry.value != str(value):
                line = _LINE.fullmatch(lines[entry.line - 1])
                assert line is not None
                lines[entry.line - 1] = f"{line['before']}{value}{line['after']}"
    return "\n".join(lines)
