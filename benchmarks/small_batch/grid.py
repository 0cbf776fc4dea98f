"""The grid: its cells in their order, and the learning rate of each recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from benchmarks.small_batch.recipes import all_recipes, options_of, spelled
from models.norms.cmbn import CrossMiniBatchNormSpec

BATCH = 16  # images of an optimizer step, at every mini-batch size
TUNE_SEED = 0  # not used by main cells


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Cell:
    """One training. role: `tune` chooses a learning rate and is never tested, `main` counts.

    recipe: what is typed after --norm. mini_batch: images per forward. scenes: training scenes of the digits, 0 for
    other data.
    """

    role: str
    data: str
    net: str
    recipe: str
    mini_batch: int
    seed: int
    rate: float
    mosaic: bool
    steps: int
    scenes: int


CELL_FIELDS = tuple(Cell.__dataclass_fields__)


def cell_of(row: Mapping[str, Any]) -> Cell:
    return Cell(**{name: row[name] for name in CELL_FIELDS})


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The cells of a budget.

    tuned_at: mini-batches at which learning rates are tuned; () for none: `known_rates` are used, or the middle one.
    rates: by net, ascending. known_rates: by recipe and mini-batch, found by a larger budget. scenes: training scenes
    of the digits.
    """

    data: tuple[str, ...]
    nets: tuple[str, ...]
    recipes: tuple[str, ...]
    mini_batches: tuple[int, ...]
    tuned_at: tuple[int, ...]
    rates: Mapping[str, tuple[float, ...]]
    seeds: Sequence[int]
    steps: int
    scenes: int
    mosaics: tuple[bool, ...] = (False,)
    known_rates: Mapping[tuple[str, int], float] = field(default_factory=dict)

    def _cell(
        self, role: str, data: str, net: str, recipe: str, mini_batch: int, seed: int, rate: float, mosaic: bool
    ) -> Cell:
        return Cell(
            role=role,
            data=data,
            net=net,
            recipe=stand_in(recipe, mini_batch),
            mini_batch=mini_batch,
            seed=seed,
            rate=rate,
            mosaic=mosaic,
            steps=self.steps,
            scenes=self.scenes if data.startswith("digits") else 0,
        )

    def tune_cells(self) -> list[Cell]:
        """Return the tuning cells, without mosaic, for the mini-batches of this grid."""
        tuned_at = {nearest(mini_batch, self.tuned_at) for mini_batch in self.mini_batches} if self.tuned_at else ()
        return _distinct(
            self._cell("tune", data, net, recipe, mini_batch, TUNE_SEED, rate, mosaic=False)
            for net in self.nets
            for data in self.data
            for mini_batch in sorted(tuned_at)
            for recipe in self.recipes
            for rate in self.rates[net]
        )

    def main_cells(self, rows: Iterable[Mapping[str, Any]]) -> list[Cell]:
        """Return the cells with a known rate, seed by seed, so that a stopped grid has equally many of each recipe."""
        rates = TunedRates(self, rows)
        return _distinct(
            self._cell("main", data, net, recipe, mini_batch, seed, rate, mosaic)
            for seed in self.seeds
            for net in self.nets
            for data in self.data
            for mosaic in self.mosaics
            for mini_batch in self.mini_batches
            for recipe in self.recipes
            if (rate := rates.of(data, net, recipe, mini_batch)) is not None
        )


class TunedRates:
    """The rate with the best AP on val among a recipe's tuning cells: one seed, the same rates for every recipe."""

    def __init__(self, grid: Grid, rows: Iterable[Mapping[str, Any]]) -> None:
        self._grid = grid
        self._val_ap: dict[tuple[str, str, str, int], dict[float, float]] = {}
        for row in rows:
            if row["role"] == "tune" and row["steps"] == grid.steps:
                place = (row["data"], row["net"], row["recipe"], row["mini_batch"])
                self._val_ap.setdefault(place, {})[row["rate"]] = row["val_AP"]

    def of(self, data: str, net: str, recipe: str, mini_batch: int) -> float | None:
        """Return the rate, None if its tuning is incomplete. In a grid without tuning, a known or the middle rate."""
        rates, tuned_at = self._grid.rates[net], self._grid.tuned_at
        if not tuned_at:
            return self._grid.known_rates.get((recipe, mini_batch), rates[(len(rates) - 1) // 2])
        near = nearest(mini_batch, tuned_at)
        tried = self._val_ap.get((data, net, stand_in(recipe, near), near), {})
        if not tried.keys() >= set(rates):
            return None
        return max(rates, key=lambda rate: tried[rate])

    def is_at_edge(self, net: str, rate: float) -> bool:
        """Return whether the rate is the smallest or largest that was tried, so that a better one may lie outside."""
        rates = self._grid.rates[net]
        return bool(self._grid.tuned_at) and rate in (rates[0], rates[-1])


@cache
def stand_in(recipe: str, mini_batch: int) -> str:
    """Return the recipe that is trained in its place, because it computes the same to the last bit.

    Where a mini-batch is the whole batch, cmbn has nothing to pool: its options, the gradient `darknet` aside, change
    nothing.
    """
    options = options_of(recipe)
    spec = options.spec
    if mini_batch < BATCH or not isinstance(spec, CrossMiniBatchNormSpec) or spec.gradient == "darknet":
        return recipe
    return spelled(replace(options, norm=spec.name))


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Return each cell once, in order: several recipes may have one stand-in."""
    return list(dict.fromkeys(cells))


def nearest(mini_batch: int, choices: Sequence[int]) -> int:
    """Return the choice nearest by ratio, the smaller of two."""
    return min(choices, key=lambda choice: (abs(math.log2(choice / mini_batch)), choice))


def left(cells: Iterable[Cell], rows: Iterable[Mapping[str, Any]]) -> Iterator[Cell]:
    """Yield the cells that have no row."""
    done = {cell_of(row) for row in rows}
    return (cell for cell in cells if cell not in done)


_RATES = {
    "small": (0.005, 0.01, 0.02),
    "tiny": (0.0025, 0.005, 0.01),
    "half": (0.0025, 0.005, 0.01),
}

# Burn-ins are a tenth of the steps, as the learning rate's.
BUDGETS = {
    # Shows that it runs; its figures mean nothing.
    "smoke": Grid(
        data=("digits-1",),
        nets=("small",),
        recipes=("bn", "cmbn"),
        mini_batches=(8, 16),
        tuned_at=(),
        rates=_RATES,
        seeds=(1,),
        steps=4,
        scenes=32,
    ),
    "quick": Grid(
        data=("digits-1",),
        nets=("small",),
        recipes=("bn", "cmbn", "cmbn:carry,burn_in_steps=51"),
        mini_batches=(1, 16),
        tuned_at=(),
        rates=_RATES,
        seeds=range(1, 4),
        steps=512,
        scenes=1024,
        known_rates={("cmbn", 1): 0.02},  # of `standard`, which has the same trainings among others
    ),
    "standard": Grid(
        data=("digits-1", "digits-0.4", "bccd"),
        nets=("small",),
        recipes=(
            "bn",
            "bn --weight-centralization",
            "bn --norm-freeze-after 0.7",
            "cmbn",
            "cmbn --weight-centralization",
            "cmbn:burn_in_steps=51",
            "cmbn:carry,burn_in_steps=51",
            "cmbn:gradient=share",
            "cmbn:gradient=renorm",
            "cmbn:gradient=darknet",
            "cbn:gradient=share,burn_in_steps=51",
            "cbn:burn_in_steps=51",
            "mabn",
            "gn",
        ),
        mini_batches=(1, 2, 16),
        tuned_at=(1, 16),
        rates=_RATES,
        seeds=range(1, 6),
        steps=512,
        scenes=1024,
    ),
    "full": Grid(
        data=("digits-1", "digits-0.4", "digits-0", "bccd"),
        nets=("tiny", "half"),
        recipes=all_recipes(steps=4096),
        mini_batches=(1, 2, 4, 8, 16),
        tuned_at=(1, 2, 16),
        rates=_RATES,
        seeds=range(1, 6),
        steps=4096,
        scenes=8192,
        mosaics=(False, True),
    ),
}
