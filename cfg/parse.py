"""The darknet cfg grammar: text -> sections of key=value entries with their line numbers.

Source: darknet `parser.c` (read_cfg) and `option_list.c`. Whitespace is removed everywhere in a line, lines that begin
with # or ; are comments, a line is split at its first =, and the first of several equal keys wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches

MAX_SECTIONS = 4096

MAX_NUMBER = 1e9  # of numbers with a point: beyond any use, within float32

MAX_UNKNOWN_KEYS = 20  # per section; the rest are counted in one warning

ALIASES = {
    "avg": "avgpool",
    "conn": "connected",
    "conv": "convolutional",
    "local_avg": "local_avgpool",
    "lrn": "normalization",
    "max": "maxpool",
    "network": "net",
    "silence": "empty",
    "soft": "softmax",
}

_INTEGER = re.compile(r"([+-]?[0-9]{1,15})(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_COMMENT = re.compile("[#;]")
_BLANKS = str.maketrans("", "", " \t\r\n")


class CfgError(ValueError):
    """A cfg that cannot be used. The message begins with `file:line: `, or `file: ` if there is no such file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The right side of one `key=value`, without whitespace, and its line, counted from 1."""

    value: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One `[name]` with its entries.

    `used` holds the keys that were read, as in darknet's option list: a key that is never read is unknown. All readers
    raise CfgError for a value of the wrong type or outside low..high (both inclusive).
    """

    path: str
    name: str
    line: int
    entries: dict[str, Entry] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def error(self, message: str, key: str = "") -> CfgError:
        """Return an error at the line of `key`, or at the section's line if the key is absent."""
        return CfgError(self._at(key, message))

    def note(self, message: str, key: str) -> None:
        """Add a warning at the line that `error` would name."""
        self.notes.append(self._at(key, message))

    def _at(self, key: str, message: str) -> str:
        line = self.entries[key].line if key in self.entries else self.line
        return f"{self.path}:{line}: {message}"

    def flag(self, key: str, default: bool) -> bool:
        return self.integer(key, int(default)) != 0

    def integer(
        self, key: str, default: int | None = None, *, fallback: str = "", low: float = 0, high: float = 2**31
    ) -> int:
        """Return a whole number; without a default the key is required. fallback: the key with the default."""
        if fallback:
            default = self.integer(fallback, default, low=low, high=high)
        value = self._value(key, required=default is None)
        if value is None:
            assert default is not None
            return default
        return int(self._checked(key, _to_integer(_scalar(value)), "a whole number", low, high))

    def number(self, key: str, default: float, *, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> float:
        value = self._value(key)
        if value is None:
            return default
        return float(self._checked(key, _to_number(_scalar(value)), "a number", low, high))

    def word(self, key: str, default: str, choices: tuple[str, ...], *, unknown: str | None = None) -> str:
        """Return one of `choices`. Any other word is read as `unknown`, with a warning; without it, an error."""
        value = self._value(key)
        if value is None:
            return default
        if value not in choices:
            wrong, hint = f"{key}={_short(value, 80)} is not one of {', '.join(choices)}", did_you_mean(value, choices)
            if unknown is None:
                raise self.error(f"{wrong}{hint}", key)
            self.note(f"{wrong}: read as {unknown}, as darknet does{hint}", key)
            return unknown
        return value

    def text(self, key: str) -> str:
        """Return the value as it is, without a comment; "" if the key is absent."""
        return _scalar(self._value(key) or "")

    def integers(self, key: str, *, required: bool = False) -> tuple[int, ...]:
        """Return a comma-separated list; empty if the key is absent."""
        return tuple(
            int(self._checked(key, _to_integer(item), "a list of whole numbers", -(2**31), 2**31))
            for item in self._items(key, required)
        )

    def numbers(self, key: str, *, required: bool = False, spare_comma: bool = False) -> tuple[float, ...]:
        """Return a comma-separated list; empty if the key is absent. spare_comma: whether it may end with a comma."""
        items = self._items(key, required)
        if spare_comma and len(items) > 1 and not items[-1]:
            items.pop()
        return tuple(
            float(self._checked(key, _to_number(item), "a list of numbers", -MAX_NUMBER, MAX_NUMBER)) for item in items
        )

    def ignore(self, *keys: str) -> None:
        """Accept keys that darknet knows and that have no effect on a detector here."""
        self.used.update(keys)

    def warn_unless(self, reason: str = "is not supported", /, **defaults: float | str) -> None:
        """Warn of keys that change training and are not used here for a reason, unless they have these values."""
        for key, value in self._deviating(defaults):
            self.note(f"{key}={value} {reason} and is ignored", key)

    def refuse_unless(self, **defaults: float | str) -> None:
        """Raise CfgError for keys that change the output and are not implemented, unless they have these values."""
        for key, value in self._deviating(defaults):
            raise self.error(f"{key}={value} in [{self.name}] is not supported", key)

    def warnings(self, net_keys: set[str]) -> list[str]:
        """Return a sentence for each unknown key, and one for all keys that belong to [net].

        Several published cfgs end with a second [net] block that has its header commented out.
        """
        unknown = [key for key in self.entries if key not in self.used and key not in net_keys]
        pasted = [key for key in self.entries if key not in self.used and key in net_keys]
        sentences = list(self.notes)
        for key in unknown[:MAX_UNKNOWN_KEYS]:
            hint = did_you_mean(key, self.used)
            sentences.append(self._at(key, f"unknown key '{_short(key)}' in [{self.name}]{hint}"))
        if more := unknown[MAX_UNKNOWN_KEYS:]:
            sentences.append(self._at(more[0], f"{len(more)} more unknown keys in [{self.name}]"))
        if pasted:
            sentences.append(self._at(pasted[0], f"[net] keys in [{self.name}] are ignored: {', '.join(pasted)}"))
        return sentences

    def _value(self, key: str, *, required: bool = False) -> str | None:
        self.used.add(key)
        if key in self.entries:
            return self.entries[key].value
        if required:
            raise self.error(f"[{self.name}] needs a key '{key}'")
        return None

    def _items(self, key: str, required: bool) -> list[str]:
        value = self._value(key, required=required)
        if value is None:
            return []
        # In darknet a # ends the list, and a ; only the number it stands in: items after it still count.
        *items, last = value.split("#", 1)[0].split(",")
        return [*items, _scalar(last)]

    def _checked(self, key: str, number: float | None, kind: str, low: float, high: float) -> float:
        value = _short(self.entries[key].value, 80)
        if number is None:
            raise self.error(f"{key}={value} is not {kind}", key)
        if not low <= number <= high:
            limit = f"below {low:g}" if number < low else f"above {high:g}"
            raise self.error(f"{key}={value} is {limit}", key)
        return number

    def _deviating(self, defaults: dict[str, float | str]) -> Iterator[tuple[str, str]]:
        """Yield keys with other values than `defaults`, and these values."""
        self.used.update(defaults)
        for key in filter(self.entries.__contains__, defaults):
            value, default = self.entries[key].value, defaults[key]
            if value != default if isinstance(default, str) else _to_number(_scalar(value)) != default:
                yield key, _short(value, 80)


def parse_sections(text: str, *, path: str) -> list[Section]:
    """Return the sections in file order, with aliases of names resolved; `path` is used in messages only.

    Raises CfgError.
    """
    sections: list[Section] = []
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.translate(_BLANKS)
        where = f"{path}:{number}"
        if not line or line[0] in "#;":
            continue
        if line.startswith("["):
            name = line[1:-1]
            if not line.endswith("]") or not name:
                raise CfgError(f"{where}: '{_short(line)}' is not a [section]")
            sections.append(Section(path=path, name=ALIASES.get(name, name), line=number))
            if len(sections) > MAX_SECTIONS:
                raise CfgError(f"{where}: more than {MAX_SECTIONS} sections")
            continue
        if not sections:
            raise CfgError(f"{where}: '{_short(line)}' stands before the first [section]")
        key, equals, value = line.partition("=")
        if not (key and equals and value):  # darknet reports `key=`, too, and continues without it
            raise CfgError(f"{where}: '{_short(line)}' is neither a [section] nor key=value")
        first = sections[-1].entries.setdefault(key, Entry(value=value, line=number))
        if first.value != value:
            given = f"{_short(key)}={_short(first.value)} of line {first.line}"
            sections[-1].notes.append(
                f"{where}: {_short(line, 80)} is ignored, the first of equal keys counts: {given}"
            )
    if not sections:
        raise CfgError(f"{path}:1: no [net] section, the file holds no network")
    return sections


def key_of(line: str) -> str:
    """Return what stands before the first = of a line, without whitespace."""
    return line.translate(_BLANKS).partition("=")[0]


def did_you_mean(word: str, known: tuple[str, ...] | set[str]) -> str:
    """Return ", did you mean 'x'?", or "" if nothing known is close."""
    close = get_close_matches(word, sorted(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def _scalar(value: str) -> str:
    """Cut a trailing comment, at which darknet's atoi and atof stop."""
    return _COMMENT.split(value, maxsplit=1)[0]


def _to_integer(text: str) -> int | None:
    """Return the integer of 64 and 64.0; None for 64.5, which atoi would silently truncate."""
    match = _INTEGER.fullmatch(text)
    return int(match[1]) if match else None


def _to_number(text: str) -> float | None:
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
