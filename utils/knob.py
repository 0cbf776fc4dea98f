"""A setting the user can turn: a dataclass field that carries its own help text.

The dataclass lives with the part it configures; `options.py` composes them, `flags.py` makes flags of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from typing import Any

from utils.errors import UserError


def knob(
    default: Any,
    text: str,
    *,
    unit: str | None = None,
    choices: Sequence[str] | None = None,
    parse: Callable[[str], Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    alone: Any = None,
    formerly: str | None = None,
    positional: bool = False,
) -> Any:
    """Return a dataclass field; `text` is its help, `unit` stands for its value there.

    `parse` turns the flag's string into the value and raises UserError on a bad one; without it the annotation decides
    (bool, int, float, str). `low` and `high` are the inclusive limits of a number, or of each number of a tuple; NaN
    and infinity are outside any limits. `alone` is the value of the flag without one. `formerly` is the name in earlier
    versions, still understood but not shown. A required knob is `positional` if it is typed without its flag; a
    required tuple always is.
    """
    metadata = {"text": text, "unit": unit, "choices": choices, "parse": parse, "low": low, "high": high}
    metadata |= {"alone": alone, "formerly": formerly, "positional": positional}
    return field(default=default, metadata=metadata)


def outside_limits(knob_field: Field[Any], value: Any) -> str:
    """Return what `value` fails to be, such as "must lie between 0 and 1"; "" if it is within the knob's limits."""
    if not isinstance(value, int | float):
        return ""
    low, high = knob_field.metadata.get("low"), knob_field.metadata.get("high")
    finite = -math.inf < value < math.inf  # math.isfinite fails on a whole number too large for a float
    if finite and (low is None or low <= value) and (high is None or value <= high):
        return ""
    if low is not None and high is not None:
        return f"must lie between {low} and {high}"
    limits = [] if finite else ["finite"]
    limits += [] if low is None else [f"at least {low}"]
    limits += [] if high is None else [f"at most {high}"]
    return f"must be {' and '.join(limits)}"


def check_limits(options: Any) -> None:
    """Raise UserError for the first number of this dataclass outside its knob's limits; nested ones check their own."""
    for f in fields(options):
        value = getattr(options, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            if wrong := outside_limits(f, number):
                raise UserError(f"{f.name}={value} {wrong}")
