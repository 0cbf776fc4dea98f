"""The text of a cfg with some of its values changed, and all else, comments too, as it was."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cfg.parse import key_of, parse_sections

_LINE = re.compile(r"(?P<before>[^=]*=[ \t]*).*?(?P<after>[ \t]*(#.*)?\r?)")


def with_values(text: str, changes: Mapping[int, Mapping[str, object]]) -> str:
    """changes: line of a section's header, counted from 1 -> key -> new value, or None, which makes a comment of the
    key's lines. A key that is absent is added."""
    lines = text.split("\n")
    sections = parse_sections(text, path="cfg")
    ends = [*(section.line - 1 for section in sections[1:]), len(lines)]
    for section, section_end in zip(sections, ends, strict=True):
        for key, value in changes.get(section.line, {}).items():
            entry = section.entries.get(key)
            if value is None:
                # All of them: darknet reads the first that is left.
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
