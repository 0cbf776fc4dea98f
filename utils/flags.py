"""A command line made of dataclasses of knobs, and the settings that come of it: argparse, for the pages.

`parse_flags` returns only what was typed, `resolve` lays it over what files say and the defaults, once; the result is
printed, saved and never changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, TypeVar

from utils.knob import outside_limits

Options = TypeVar("Options")


def parse_flags(kind: type, argv: Sequence[str] | None) -> dict[str, Any]:
    """Parse `argv`: only what was typed, by field name. Exits with 0 after --help, with 2 on a bad flag.

    The first line of `kind`'s docstring is the command, the rest what it does. A field that holds a dataclass of knobs
    is a group of flags; its metadata has the group's title.
    """
    command, _, description = inspect.cleandoc(kind.__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=command.split()[-1],
        description=description.strip(),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_flags(parser.add_argument_group("main"), kind)
    for f in dataclasses.fields(kind):
        if inner := _nested(f):
            _add_flags(parser.add_argument_group(f.metadata["title"]), inner)
    given = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def resolve(kind: type[Options], given: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> Options:
    """The settings: what was typed, else what the files (cfg, data set) say, else the default."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        if inner := _nested(f):
            values[f.name] = resolve(inner, given, files)
        elif f.name in given:
            values[f.name] = given[f.name]
        elif files and f.name in files:
            values[f.name] = files[f.name]
    return kind(**values)


def flatten(options: Any) -> dict[str, Any]:
    """Settings as one flat dict of plain values, for printing and saving; `resolve` takes it back."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {f.name: value})
    return flat


def parse_image_hw(text: str) -> tuple[int, int]:
    """'416' -> (416, 416); '96x128' -> height 96, width 128."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size: write 416, or HEIGHTxWIDTH as in 96x128")
    return int(sides[0]), int(sides[-1])


def positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def parse_subdivisions(text: str) -> int | str:
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 1, or auto")
    return text if text == "auto" else int(text)


def _add_flags(group: Any, kind: type) -> None:
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if _nested(f) or "text" not in f.metadata:
            continue
        wanted: dict[str, Any] = {"help": _help(f)}
        flag = "--" + f.name.replace("_", "-")
        required = f.default is MISSING
        plain, is_tuple = _plain_type(hints[f.name])
        choices = f.metadata["choices"]
        if plain is bool:
            # Both ways, because a file may say either: --no-letterbox overrules letter_box=1.
            wanted["action"] = argparse.BooleanOptionalAction
        else:
            wanted["type"] = f.metadata["parse"] or _checked_type(f, plain)
            wanted["metavar"] = f.metadata["unit"] or ("" if choices else plain.__name__.upper())
            if choices:
                wanted["choices"] = tuple(choices() if callable(choices) else choices)
                wanted.pop("metavar")
            if is_tuple and not f.metadata["parse"]:
                wanted["nargs"] = "+"
            if f.metadata["alone"] is not None:
                wanted |= {"nargs": "?", "const": f.metadata["alone"]}
        if required and is_tuple:
            group.add_argument(f.name, **wanted)
        else:
            group.add_argument(flag, required=required, dest=f.name, **wanted)


def _checked_type(f: dataclasses.Field[Any], plain: type) -> Callable[[str], Any]:
    """`plain` for argparse, which refuses what is outside the knob's limits."""

    def parse(text: str) -> Any:
        value = plain(text)
        if wrong := outside_limits(f, value):
            raise argparse.ArgumentTypeError(f"{text} {wrong}")
        return value

    parse.__name__ = plain.__name__  # argparse's "invalid int value" says it
    return parse


def _help(f: dataclasses.Field[Any]) -> str:
    text = f.metadata["text"].replace("%", "%%")
    silent = f.default is MISSING or f.default is None or f.default is False or f.default == ()
    return text if silent or "(default" in text else f"{text} (default {f.default})"


def _nested(f: dataclasses.Field[Any]) -> type | None:
    factory = f.default_factory
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def _plain_type(hint: Any) -> tuple[type, bool]:
    """int | None -> (int, False); tuple[float, ...] -> (float, True)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
