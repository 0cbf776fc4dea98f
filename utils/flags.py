"""Command lines made of dataclasses of knobs, and the settings that result from them.

`parse_flags` returns only what was typed; `resolve` adds settings from files and the defaults, once. The result is
printed, saved and never changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from itertools import takewhile
from typing import Any, NoReturn, TypeVar

from utils import ranks
from utils.errors import UserError
from utils.knob import knob, outside_limits
from utils.printable import printable

Options = TypeVar("Options")
Foreign = Sequence[tuple[str, str]]
METAVARS = {int: "N", float: "FLOAT", str: "STR"}


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a bad command line in one line on stderr, without the usage; exit code 2."""

    def error(self, message: str) -> NoReturn:
        shorter = re.sub(r"(\S{80})\S{80,}", r"\1...", message)  # what was typed may be of any length
        text = "\n".join(map(printable, shorter.split("\n")))
        self.exit(2, f"error: {text}\n" if ranks.is_rank_zero() else None)  # all ranks have the same flags


def parse_flags(kind: type, argv: Sequence[str] | None, *, foreign: Foreign = ()) -> dict[str, Any]:
    """Return what was typed, by field name. Exits with 0 after --help, with 2 and one line on a bad flag.

    The first line of `kind`'s docstring is the command, the rest describes it. A field that holds a dataclass of knobs
    is a group of flags with the title in its metadata. `foreign`: flags that a page does not have (removed ones, and
    those of other programs), separated by blanks, and what the error message recommends. The first recommendation
    counts that names no flag which the page lacks.
    """
    command, _, description = inspect.cleandoc(kind.__doc__ or "").partition("\n")
    parser = FlagParser(
        prog=command.split()[-1],
        description=description.strip(),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    flags = {"--help": True, "-h": True} | _add_flags(parser, "main", kind)
    argv = sys.argv[1:] if argv is None else argv
    if unknown := _first_unknown(argv, flags):
        parser.error(_no_such_flag(command, unknown, flags, foreign))
    typed = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}


def resolve(kind: type[Options], given: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> Options:
    """Return the settings; precedence: what was typed, the files (cfg, data set), the default."""
    given, values = {**(files or {}), **given}, dict[str, Any]()
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        if group := _nested(f):
            values[f.name] = resolve(group, given)
        elif f.name in given:
            values[f.name] = given[f.name]
    return kind(**values)


def flatten(options: Any) -> dict[str, Any]:
    """Return settings as one flat dict of plain values, for printing and saving; `resolve` reverses it."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {f.name: value})
    return flat


def current_names(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings saved by an earlier version, renamed ones (a knob's `formerly`) under their new names."""
    groups = filter(None, map(_nested, dataclasses.fields(kind)))
    knobs = [f for part in (kind, *groups) for f in dataclasses.fields(part)]
    renamed = {f.metadata.get("formerly"): f.name for f in knobs}
    return {renamed.get(name, name): value for name, value in settings.items()}


def parse_image_hw(text: str) -> tuple[int, int]:
    """'416' -> (416, 416); '96x128' -> height 96, width 128."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size: write 416, or HEIGHTxWIDTH as in 96x128")
    return int(sides[0]), int(sides[-1])


def image_size_knob(text: str) -> Any:
    """Return a knob for a network's input (height, width); None without the flag."""
    return knob(None, text, unit="PX", parse=parse_image_hw)


def parse_names(text: str) -> tuple[str, ...]:
    """'cat,traffic light' -> ('cat', 'traffic light')."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"'{text}' has no name: write a,b")
    return names


def parse_count(text: str) -> int | str:
    """'4' -> 4, 'auto' -> 'auto'."""
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 1, or auto")
    return text if text == "auto" else int(text)


def parse_learning_rate(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be a number, or auto") from None


def _add_flags(parser: FlagParser, title: str, kind: type) -> dict[str, bool]:
    """Add the flags of `kind`'s knobs, and of the groups in it. Returns for each flag whether --help shows it."""
    group, hints = parser.add_argument_group(title), typing.get_type_hints(kind)
    flags: dict[str, bool] = {}
    for f in dataclasses.fields(kind):
        if nested := _nested(f):
            flags |= _add_flags(parser, f.metadata["title"], nested)
            continue
        if "text" not in f.metadata:
            continue
        metadata, required = f.metadata, f.default is MISSING
        plain, is_tuple = _plain_type(hints[f.name])
        if plain is bool:
            # Both ways, because a file may set either: --no-letterbox overrides letter_box=1.
            arguments: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            arguments = {
                "type": _value_parser(f, plain),
                "choices": metadata["choices"],
                "metavar": metadata["unit"] or (None if metadata["choices"] else METAVARS[plain]),
                "nargs": "?" if metadata["alone"] is not None else "+" if is_tuple and not metadata["parse"] else None,
                "const": metadata["alone"],
            }
        if required and (is_tuple or metadata["positional"]):
            group.add_argument(f.name, help=_help(f), **arguments)
            continue
        action = group.add_argument(flag_of(f.name), required=required, dest=f.name, help=_help(f), **arguments)
        flags |= dict.fromkeys(action.option_strings, True)
        if former := metadata["formerly"]:
            action = group.add_argument(flag_of(former), dest=f.name, help=argparse.SUPPRESS, **arguments)
            flags |= dict.fromkeys(action.option_strings, False)
    return flags


def flag_of(name: str) -> str:
    """Return a setting's flag: `--batch-size` of batch_size."""
    return "--" + name.replace("_", "-")


def _first_unknown(argv: Sequence[str], known: Mapping[str, bool]) -> str:
    """Return the first flag that is not among `known`, or "". argparse would report missing arguments first."""
    for argument in takewhile(lambda argument: argument not in ("--", "-h", "--help"), argv):
        flag = argument.partition("=")[0]
        if re.fullmatch(r"--?[A-Za-z][\w-]*", flag) and flag not in known:
            return flag
    return ""


def _no_such_flag(command: str, flag: str, own: Mapping[str, bool], foreign: Foreign) -> str:
    page = command.split()[-1]
    for names, instead in foreign:
        if flag.replace("_", "-") in names.split() and set(re.findall(r"--[a-z-]+", instead)) <= own.keys():
            return f"{page} has no {flag}: {instead}"
    shown = {name.lstrip("-"): name for name, is_shown in own.items() if is_shown}
    nearest = difflib.get_close_matches(flag.lstrip("-"), shown, n=1)
    hint = f"; did you mean {shown[nearest[0]]}?" if nearest else ""
    return f"{page} has no {flag}{hint} ({command} --help lists all)"


def _value_parser(f: dataclasses.Field[Any], plain: type) -> Callable[[str], Any]:
    """Return the function that turns the flag's text into a value within the knob's limits, for argparse."""

    def parse(text: str) -> Any:
        try:
            value = (f.metadata["parse"] or plain)(text)
        except UserError as error:  # a ValueError, which argparse would replace by its own message
            flag, text = flag_of(f.name), str(error)
            raise argparse.ArgumentError(None, text if text.startswith("--") else f"{flag}: {text}") from None
        if wrong := outside_limits(f, value):
            raise argparse.ArgumentTypeError(f"{text} {wrong}")
        return value

    parse.__name__ = plain.__name__  # for argparse's "invalid int value"
    return parse


def _help(f: dataclasses.Field[Any]) -> str:
    text = f.metadata["text"].replace("%", "%%")
    silent = f.default is MISSING or f.default is None or f.default is False or f.default == ()
    return text if silent or "(default" in text else f"{text} (default {f.default})"


def _nested(f: dataclasses.Field[Any]) -> type | None:
    factory = f.default_factory
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def _plain_type(hint: Any) -> tuple[type, bool]:
    """int | None -> (int, False); tuple[float, ...] | None -> (float, True)."""
    if not typing.get_args(hint):
        return hint, False
    plain, is_tuple = _plain_type(typing.get_args(hint)[0])
    return plain, is_tuple or typing.get_origin(hint) is tuple
