"""Recipes: what is typed after `--norm`, such as `cmbn:carry,burn_in_steps=51` or `bn --weight-centralization`.

A norm with its options and, where needed, flags that are common to all norms. Rows, tables and plots show this string.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

from engine.announce import flag
from models.norms.options import NormOptions, resolve_norm
from models.norms.spec import NormSpec
from models.norms.table import parse_norm
from options import TrainOptions
from utils.errors import UserError
from utils.flags import parse_flags

BN = "bn"


def settings_of(recipe: str) -> dict[str, Any]:
    """Return the settings that the recipe types, by field name. Raises UserError for what is no recipe."""
    norm, *flags = recipe.split() or [""]
    parse_norm(norm)
    settings = parse_flags(TrainOptions, ["--norm", norm, *flags])
    if foreign := settings.keys() - {f.name for f in fields(NormOptions)}:
        raise UserError(f"'{recipe}': {', '.join(sorted(foreign))} is not about the norm")
    return settings


@cache
def options_of(recipe: str) -> NormOptions:
    """Return the resolved options. Raises UserError for what is no recipe."""
    return resolve_norm(NormOptions(**settings_of(recipe)))


def spelled(options: NormOptions) -> str:
    """Return the recipe of resolved options: in the order of the fields, without what is at its default."""
    default = asdict(resolve_norm(NormOptions(norm=options.norm)))
    changed = {name: value for name, value in asdict(options).items() if value != default[name]}
    return " ".join([options.norm, *(flag(name, value) for name, value in changed.items())])


def canonical(recipe: str, *, from_weights: bool) -> str:
    """Return the one spelling of the recipe that rows use.

    Raises UserError, also for a norm whose statistics are never measured in a training from scratch.
    """
    options = options_of(recipe)
    if options.never_measures and not from_weights:
        raise UserError(f"'{recipe}' keeps the running statistics of trained weights: give some with --weights")
    return spelled(options)


def record_of(options: NormOptions) -> dict[str, Any]:
    """Return the resolved options by name, for a row; without those that the norm does not use."""
    return {name: value for name, value in asdict(options).items() if value is not None}


def with_references(recipes: tuple[str, ...], reference_of: Callable[[str], str]) -> tuple[str, ...]:
    """Return the recipes, each once, behind the references that they need, BN first."""
    references = {reference_of(recipe) for recipe in recipes} | {BN}
    return tuple(dict.fromkeys([*sorted(references), *recipes]))


def with_burn_in(spec: NormSpec, steps: int) -> NormSpec:
    """Return the norm with a burn-in of `steps` optimizer steps, if it has any, and a ramp three times as long."""
    changed = {"burn_in_steps": steps, "ramp_steps": 3 * steps} if spec.burn_in else {}
    own: dict[str, Any] = {option: value for option, value in changed.items() if hasattr(spec, option)}
    return replace(spec, **own)
