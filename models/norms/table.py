"""The norms by name, and what is typed of them. A new norm is one file here and its name in `_FILES`."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Iterable
from dataclasses import Field, fields
from importlib import import_module
from typing import Any

from models.norms.own import is_own, own_spec, trust
from models.norms.spec import NormSpec, own_fields
from utils.errors import UserError
from utils.knob import outside_limits

_FILES = (
    "bn",
    "cmbn",
    "cbn",
    "cbn_lite",
    "mabn",
    "brn",
    "ghost",
    "group_norm",
    "bcn",
    "evonorm",
    "frn",
    "none",
)

NORMS: dict[str, type[NormSpec]] = {
    spec.name: spec for file in _FILES for spec in import_module(f"models.norms.{file}").SPECS
}
AUTO = "auto"  # no norm, but the choice of one: auto.py


def parse_norm(text: str) -> NormSpec:
    """Read NAME[:OPTION[=VALUE],...]. Raises UserError, with the options there are, for what is none of them."""
    name = text.partition(":")[0]
    if name == AUTO:
        raise UserError(f"--norm {AUTO} has no options, and is no norm of a network: it chooses one")
    if name not in NORMS and not is_own(name):
        raise UserError(f"unknown norm '{name}': choose one of {', '.join((*NORMS, AUTO))}; --norm help describes them")
    spec = NORMS[name] if name in NORMS else own_spec(name)
    return spec(**{option: _value(spec, option, value) for option, value in options_in(text).items()})


def options_in(text: str) -> dict[str, str | None]:
    """Split NAME:OPTION=VALUE,SWITCH into {"OPTION": "VALUE", "SWITCH": None}."""
    _, colon, rest = text.partition(":")
    options: dict[str, str | None] = {}
    for part in rest.split(",") if colon else ():
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not name or name in options:
            wrong = f"{name} is given twice" if name else "an option is missing after : or ,"
            raise UserError(f"--norm {text}: {wrong}")
        options[name] = value.strip() if equals else None
    return options


def checked_norm(text: str) -> str:
    """Return what was typed after --norm, once it is known to be a norm. `help` prints the norms and exits with 0.

    A class of the user's own is imported: they have typed it.
    """
    if text == "help":
        print(norms_help())
        raise SystemExit(0)
    if is_own(name := text.partition(":")[0]):
        trust(name.rpartition(".")[0])
    if text != AUTO:
        parse_norm(text)
    return text


def norms_help() -> str:
    """Return every norm with its options, their defaults, and its source."""
    usage = "--norm NAME[:OPTION[=VALUE],...], such as cmbn:carry or cbn:window=8,estimator=taylor"
    auto = f"{AUTO:10}cmbn:carry where few images are in a forward (cbn where that is the whole batch), else bn"
    common = "\n".join(["NAME:ws   every norm but none:", *_help_of(fields(NormSpec))])
    return "\n\n".join([usage, auto, common, *map(_help, NORMS.values())])


def _help(spec: type[NormSpec]) -> str:
    return "\n".join([f"{spec.name:9} {spec.summary}", f"{'':10}{spec.source}", *_help_of(own_fields(spec))])


def _help_of(options: Iterable[Field[Any]]) -> list[str]:
    lines = []
    for f in options:
        value = {True: "on", False: "off"}.get(f.default, f.default) if isinstance(f.default, bool) else f.default
        default = "" if value is None else f" (default {value})"
        text = textwrap.wrap(f.metadata.get("text", "") + default, width=80)
        lines += [f"{'':12}{f.name if n == 0 else '':16}{part}" for n, part in enumerate(text)]
    return lines


def _value(spec: type[NormSpec], option: str, text: str | None) -> Any:
    """Read one option's value; None where only its name was typed. Raises UserError."""
    field = next((f for f in fields(spec) if f.name == option), None)
    if field is None:
        raise UserError(f"--norm {spec.name} has no option '{option}'\n\n{_help(spec)}")
    hint = typing.get_type_hints(spec)[option]
    kind = next(iter(set(typing.get_args(hint)) - {type(None)}), hint)
    switches = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
    wrong = f"--norm {spec.name}: {option}" + ("" if text is None else f"={text}")
    if kind is bool:
        value = switches.get("on" if text is None else text.lower())
        if value is None:
            raise UserError(f"{wrong} must be on or off")
        return value
    choices = field.metadata.get("choices")
    if choices and text not in choices:
        raise UserError(f"{wrong} must be one of {', '.join(choices)}")
    try:
        value = kind(text)
    except (TypeError, ValueError):
        raise UserError(f"{wrong} needs {'a whole number' if kind is int else 'a number'}") from None
    if limits := outside_limits(field, value):
        raise UserError(f"{wrong} {limits}")
    return value


def checked_part(text: str) -> str:
    """Return what was typed after --norm-heads, as `checked_norm` does."""
    if text == AUTO:
        raise UserError(f"--norm-heads needs a norm: {AUTO} is for --norm, which chooses that of the backbone then")
    return checked_norm(text)
