"""A setting the user can turn: a dataclass field that carries its own help text.

The dataclass lives with the part it configures; `options.py` composes them, `flags.py` makes flags of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

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
    finite = abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)  # torch has 64 bits
    if finite and (low is None or low <= value) and (high is None or value <= high):
        return ""
    if low is not None and high is not None:
        return f"must lie between {low} and {high}"
    limits = [] if finite else ["finite"]
    limits += [] if low is None else [f"at least {low}"]
    limits += [] if high is None else [f"at most {high}"]
    return f"must be {' and '.join(limits)}"


def check_limits(options: Any) -> None:
    """Raise UserError for the first value of this dataclass of another type than annotated, or that its knob excludes.

    Command lines cannot hold one, files can. Nested dataclasses check their own.
    """
    hints = get_type_hints(type(options))
    for f in fields(options):
        value, choices = getattr(options, f.name), f.metadata.get("choices")
        if not _is_of(value, hints[f.name]):
            raise UserError(f"{f.name} is of type {type(value).__name__}")
        for each in value if isinstance(value, tuple) else (value,):
            wrong = outside_limits(f, each)
            if choices and isinstance(each, str) and each not in choices:
                wrong = f"must be one of {', '.join(choices)}"
            if wrong:
                raise UserError(f"{f.name}={str(value)[:80]} {wrong}")


def _is_of(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type; whole numbers are floats, too."""
    arguments = get_args(hint)
    if hint is Any or is_dataclass(value):
        return True
    if get_origin(hint) is tuple:
        kinds = arguments[:1] * len(value) if isinstance(value, tuple) and arguments[1:] == (...,) else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if arguments:
        return any(_is_of(value, each) for each in arguments)
    return isinstance(value, {float: Real, int: Integral}.get(hint, hint))
