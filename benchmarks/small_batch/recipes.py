"""Recipes: what is typed after `--norm`, such as `cmbn:carry,burn_in_steps=51` or `bn --weight-centralization`.

A norm with its options and, where needed, flags that are common to all norms. Rows, tables and plots show this string.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import cache
from itertools import product
from typing import Any

from models.norms.options import NormOptions, resolve_norm
from models.norms.spec import NormSpec
from models.norms.table import NORMS, parse_norm
from options import TrainOptions
from utils.errors import UserError
from utils.flags import parse_flags

BN, CENTRALIZED_BN = "bn", "bn --weight-centralization"

# Recipes run before their own rate was tuned -> the recipe that lends its rate. Tables mark borrowed rates by ~.
BORROWED = dict.fromkeys(
    (
        "cmbn:carry,burn_in_steps=0",
        "cmbn:carry,burn_in_steps=51",
        "cmbn:burn_in_steps=51",
        "cbn:window=0,burn_in_steps=51",
    ),
    "cmbn",
)

# all_recipes omits: syncbn, which takes several processes; frozen, which takes trained weights; none, which is no norm.
_OMITTED = ("syncbn", "frozen", "none")
_SWEPT: dict[str, tuple[float, ...]] = {"window": (8, 16, 0), "average_images": (8.0, 64.0), "groups": (8,)}


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
    """Return the resolved options. Raises UserError, also for a norm without statistics in a training from scratch."""
    options = resolve_norm(NormOptions(**settings_of(recipe)))
    if options.never_measures:
        raise UserError(f"'{recipe}': a training from scratch has no running statistics to freeze from the start")
    return options


def spelled(options: NormOptions) -> str:
    """Return the recipe of resolved options: in the order of the fields, without what is at its default."""
    default = asdict(resolve_norm(NormOptions(norm=options.norm)))
    changed = {name: value for name, value in asdict(options).items() if value != default[name]}
    return " ".join([options.norm, *(_flag(name, value) for name, value in changed.items())])


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def canonical(recipe: str) -> str:
    """Return the one spelling of the recipe that rows use. Raises as `options_of`."""
    return spelled(options_of(recipe))


def record_of(options: NormOptions) -> dict[str, Any]:
    """Return the resolved options by name, for a row; without those that the norm does not use."""
    return {name: value for name, value in asdict(options).items() if value is not None}


def reference_of(recipe: str) -> str:
    """Return the recipe that a recipe is compared with: BN, with centralized weights where the recipe has them."""
    return CENTRALIZED_BN if options_of(recipe).weight_centralization else BN


def with_references(recipes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the recipes, each once, behind the references that they need, BN first."""
    references = {reference_of(recipe) for recipe in recipes} | {BN}
    return tuple(dict.fromkeys([*sorted(references), *recipes]))


def with_burn_in(spec: NormSpec, steps: int) -> NormSpec:
    """Return the norm with a burn-in of `steps` optimizer steps, if it has any, and a ramp three times as long."""
    changed = {"burn_in_steps": steps, "ramp_steps": 3 * steps} if spec.burn_in else {}
    own: dict[str, Any] = {option: value for option, value in changed.items() if hasattr(spec, option)}
    return replace(spec, **own)


def all_recipes(steps: int) -> tuple[str, ...]:
    """Return every norm with all combinations of its choices and switches, for trainings of `steps` optimizer steps.

    Each also with centralized weights, and with precise statistics in the end or frozen ones in the last 30 %. A norm
    at its defaults is also varied by the numbers in `_SWEPT`, and by its burn-in: with if it has none, else without.
    """
    found: list[str] = []
    late: tuple[dict[str, Any], ...] = ({}, {"precise_bn": 512}, {"norm_freeze_after": 0.7})
    for kind in (spec for name, spec in NORMS.items() if name not in _OMITTED):
        specs = [with_burn_in(spec, steps // 10) for spec in _variants(kind)]
        for spec, centralizes, flags in product(specs, (None, True), late):
            with suppress(UserError):  # gn has no statistics to freeze
                options = NormOptions(norm=str(spec), weight_centralization=centralizes, **flags)
                found.append(spelled(resolve_norm(options)))
        for option, values in {**_SWEPT, "burn_in_steps": (0 if specs[0].burn_in else steps // 10,)}.items():
            if hasattr(specs[0], option):
                found += [str(replace(specs[0], **dict[str, Any]({option: value}))) for value in values]
    return tuple(dict.fromkeys(found))


def _variants(kind: type[NormSpec]) -> Iterator[NormSpec]:
    """Yield the norm with all combinations of its choices and switches.

    But `sync`, which takes several processes, and `ws`, which is about the convolution.
    """
    choices: dict[str, tuple[Any, ...]] = {}
    for f in fields(kind):
        if isinstance(f.default, bool) and f.name not in ("sync", "ws"):
            choices[f.name] = (False, True)
        elif f.metadata["choices"]:
            choices[f.name] = f.metadata["choices"]
    for values in product(*choices.values()):
        with suppress(UserError):  # options that contradict each other
            yield kind(**dict(zip(choices, values, strict=True)))
