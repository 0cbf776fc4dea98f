"""Recipes: named sets of norm settings, spelled as a base and what is added to it: `cmbn-weights+wc+freeze`.

`frozen` is no recipe: its running statistics are those of a checkpoint, and a training from scratch has none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from models.norms.cbn import ESTIMATORS
from models.norms.table import CMBN_GRADIENTS, NormOptions, resolve_norm
from utils.errors import UserError

_WINDOWS = {"w8": 8, "w16": 16, "wbatch": 0}  # mini-batches; cbn's own is 4, and 0 means as many as a batch has


def _cbn(estimator: str, gradient: str, window: int | None = None) -> dict[str, Any]:
    settings = {"norm": "cbn", "norm_estimator": estimator, "norm_gradient": gradient}
    return settings if window is None else {**settings, "norm_window": window}


BASES: dict[str, dict[str, Any]] = {
    "bn": {"norm": "bn"},
    "bn-pooled": {"norm": "bn", "norm_running": "pooled"},
    **{f"cmbn-{gradient}": {"norm": "cmbn", "norm_gradient": gradient} for gradient in CMBN_GRADIENTS},
    "cmbn-carry": {"norm": "cmbn", "norm_carry": True, "norm_burn_in_steps": 0},
    **{f"cbn-{estimator}": _cbn(estimator, "share") for estimator in ESTIMATORS},
    **{f"cbn-{estimator}-weights": _cbn(estimator, "weights") for estimator in ("std", "taylor")},
    **{f"cbn-std-{name}": _cbn("std", "share", window) for name, window in _WINDOWS.items()},
    **{f"cbn-std-weights-{name}": _cbn("std", "weights", window) for name, window in _WINDOWS.items()},
    "cbn-std-renorm": _cbn("std", "renorm"),
    "cbn-lite": {"norm": "cbn-lite"},
    "mabn": {"norm": "mabn", "norm_average_images": 16.0},
    "mabn-8": {"norm": "mabn", "norm_average_images": 8.0},
    "mabn-64": {"norm": "mabn", "norm_average_images": 64.0},
    "brn": {"norm": "brn"},
    "gn": {"norm": "gn"},
    "gn-8": {"norm": "gn", "norm_groups": 8},  # with 32, as in the paper, a narrow layer's groups are single channels
}

ADDITIONS: dict[str, dict[str, Any]] = {
    "wc": {"weight_centralization": True},
    "precise": {"precise_bn": 512},
    "freeze": {"norm_freeze_after": 0.7},
    "burn": {},  # a tenth of the training by batch norm first, which these do anyway: _WITH_BURN_IN
}

# Recipes run before their own rates were tuned -> the recipe whose rate they had; the tables mark them by ~.
BORROWED = dict.fromkeys(
    ("cmbn-carry", "cmbn-carry+burn", "cmbn-weights+burn", "cbn-std-weights-wbatch"), "cmbn-weights"
)

# Norms whose burn-in has a default in optimizer steps: here it is a tenth of the training, as the learning rate's.
_WITH_BURN_IN = ("cbn", "cbn-lite", "brn")

_PLAIN = ("bn-pooled", "gn-8", "mabn-8", "mabn-64", "cbn-std-renorm")  # and the windows: sweeps, without additions


def settings_of(recipe: str, *, steps: int) -> dict[str, Any]:
    """The norm's flags by field name, for a training of so many optimizer steps. UserError for what is no recipe."""
    base, *added = recipe.split("+")
    if base not in BASES or len(set(added)) < len(added) or not set(added) <= set(ADDITIONS):
        raise UserError(
            f"'{recipe}' is no recipe: BASE+ADDITION+..., BASE one of {', '.join(BASES)}; "
            f"ADDITION one of {', '.join(ADDITIONS)}"
        )
    settings = dict(BASES[base])
    if settings["norm"] == "mabn" and "wc" in added:
        raise UserError(f"'{recipe}': mabn centralizes its weights as it is")
    if settings["norm"] in _WITH_BURN_IN and "burn" in added:
        raise UserError(f"'{recipe}': {settings['norm']} has a burn-in as it is")
    if settings["norm"] in _WITH_BURN_IN or "burn" in added:
        settings["norm_burn_in_steps"] = steps // 10
    if settings["norm"] == "brn":
        settings["norm_ramp_steps"] = 3 * steps // 10
    for name in added:
        settings |= ADDITIONS[name]
    return settings


def options_of(recipe: str, *, steps: int) -> NormOptions:
    """Resolved. UserError also where the norm does not read what is added."""
    return resolve_norm(NormOptions(**settings_of(recipe, steps=steps)))


def reference_of(recipe: str) -> str:
    """The recipe that a recipe is measured against: BN, with weight centralization where the recipe has it."""
    return "bn+wc" if options_of(recipe, steps=100).weight_centralization else "bn"


def typed(recipe: str, *, steps: int) -> str:
    """The flags of train.py that it stands for in a training of so many optimizer steps."""
    settings = settings_of(recipe, steps=steps).items()
    return " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in settings)


def with_references(recipes: tuple[str, ...]) -> tuple[str, ...]:
    """Each once, BN first, and every reference that they need."""
    references = {reference_of(recipe) for recipe in recipes} | {"bn"}
    return tuple(dict.fromkeys([*sorted(references), *recipes]))


def all_recipes() -> tuple[str, ...]:
    """Every base, and what can be added to those that are no sweep: wc or not, times nothing, precise, freeze, burn."""
    swept = {base for base in BASES if base.endswith(tuple(_WINDOWS))} | set(_PLAIN)
    found = []
    for base in BASES:
        for wc in ("", "+wc") if base not in swept else ("",):
            for late in ("", "+precise", "+freeze", "+burn") if base not in swept else ("",):
                try:
                    options_of(base + wc + late, steps=100)
                except UserError:
                    continue  # gn has no statistics to freeze, mabn is centralized already, bn's burn-in is bn itself
                found.append(base + wc + late)
    return tuple(found)


def spoken(options: NormOptions) -> dict[str, Any]:
    """What the norm was told, for a record: settings it does not read are left out."""
    return {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
