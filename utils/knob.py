"""A setting the user can turn: a dataclass field that carries its own help text.

The dataclass lives with the part it turns; `options.py` composes them and makes the flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any


def knob(
    default: Any,
    text: str,
    *,
    unit: str | None = None,
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field: `text` is its help, `unit` stands for its value there.

    `parse` turns the flag's string into the value; without it the annotation decides (bool, int, float, str).
    `choices` may be a callable when the names are defined later in the file.
    """
    return field(default=default, metadata={"text": text, "unit": unit, "choices": choices, "parse": parse})
