"""A time as a user types it: 3h, 90m, 45s, 1h30m."""

from __future__ import annotations

import re

from utils.errors import UserError

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PATTERN = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in _SECONDS))


def seconds_in(text: str) -> float:
    """Return the seconds: 5400 of "1h30m". Raises UserError for another form, and for no time at all."""
    found = _PATTERN.fullmatch(text.strip().lower())
    numbers = [float(number or 0) for number in found.groups()] if found else [0.0]
    if not sum(numbers):
        raise UserError(f"'{text}' is not a time: write 3h, 90m, 45s or 1h30m")
    return sum(number * unit_s for number, unit_s in zip(numbers, _SECONDS.values(), strict=True))


def checked_duration(text: str) -> str:
    """Return the text. Raises as `seconds_in`."""
    seconds_in(text)
    return text


def in_words(seconds: float) -> str:
    """Return such as "40 s", "12 min", "3:05 h": what a user wants to know of a time to wait."""
    if seconds < 89.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60}:{minutes % 60:02d} h"
