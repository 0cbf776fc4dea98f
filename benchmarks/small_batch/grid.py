"""The grid: which cells there are, in what order, and which learning rate each recipe has earned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.small_batch.recipes import all_recipes

BATCH = 16  # images of an optimizer step, at every mini-batch size
TUNE_SEED = 0  # no main cell's


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Cell:
    """One training. role: `tune` chooses a learning rate and is never tested, `main` counts.

    scenes: training scenes of the digits, 0 for other data. mini_batch: images per forward.
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
    """tuned_at: mini-batches at which learning rates are tried, () = none: `known_rates` are used, or the middle one.

    rates: by net, ascending. known_rates: by recipe and mini-batch, as a larger budget has found them. scenes: of the
    digits, to train on.
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
        """Without mosaic, and only for the mini-batches of this grid."""
        tuned_at = {nearest(each, self.tuned_at) for each in self.mini_batches} if self.tuned_at else ()
        return _distinct(
            self._cell("tune", data, net, recipe, mini_batch, TUNE_SEED, rate, mosaic=False)
            for net in self.nets
            for data in self.data
            for mini_batch in sorted(tuned_at)
            for recipe in self.recipes
            for rate in self.rates[net]
        )

    def main_cells(self, rows: Iterable[Mapping[str, Any]]) -> list[Cell]:
        """Those whose rate the rows tell. Seed by seed: a grid that is stopped has as many seeds of each recipe."""
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
        """None where some of its tuning is missing. Without any tuning, what is known, or the middle of the rates."""
        rates, tuned_at = self._grid.rates[net], self._grid.tuned_at
        if not tuned_at:
            return self._grid.known_rates.get((recipe, mini_batch), rates[(len(rates) - 1) // 2])
        near = nearest(mini_batch, tuned_at)
        tried = self._val_ap.get((data, net, stand_in(recipe, near), near), {})
        if not tried.keys() >= set(rates):
            return None
        return max(rates, key=lambda rate: tried[rate])

    def is_at_edge(self, net: str, rate: float) -> bool:
        """Whether a better rate may lie outside those that were tried."""
        rates = self._grid.rates[net]
        return bool(self._grid.tuned_at) and rate in (rates[0], rates[-1])


def stand_in(recipe: str, mini_batch: int) -> str:
    """The recipe that is trained in its place, being the same to the last bit.

    Where a mini-batch is the whole batch, cmbn has nobody to pool with: its gradients that begin at a later mini-batch,
    what it carries over for those to come, and a burn-in by batch norm change nothing.
    """
    base, *added = recipe.split("+")
    if mini_batch < BATCH or base not in ("cmbn-weights", "cmbn-share", "cmbn-renorm", "cmbn-carry"):
        return recipe
    return "+".join(["cmbn-weights", *(name for name in added if name != "burn")])


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    """In their order, each once: several recipes may have one stand-in."""
    return list(dict.fromkeys(cells))


def nearest(mini_batch: int, choices: Sequence[int]) -> int:
    """By ratio; the smaller of two."""
    return min(choices, key=lambda choice: (abs(math.log2(choice / mini_batch)), choice))


def left(cells: Iterable[Cell], rows: Iterable[Mapping[str, Any]]) -> Iterator[Cell]:
    """Those that no row is of."""
    done = {cell_of(row) for row in rows}
    return (cell for cell in cells if cell not in done)


_RATES = {
    "small": (0.005, 0.01, 0.02),
    "tiny": (0.0025, 0.005, 0.01),
    "half": (0.0025, 0.005, 0.01),
}

BUDGETS = {
    # Proves that it runs, on all kinds of data; its figures mean nothing.
    "smoke": Grid(
        data=("digits-1",),
        nets=("small",),
        recipes=("bn", "cmbn-weights"),
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
        recipes=("bn", "cmbn-weights", "cmbn-carry+burn"),
        mini_batches=(1, 16),
        tuned_at=(),
        rates=_RATES,
        seeds=range(1, 4),
        steps=512,
        scenes=1024,
        known_rates={("cmbn-weights", 1): 0.02},  # of `standard`, which has the same trainings among others
    ),
    "standard": Grid(
        data=("digits-1", "digits-0.4", "bccd"),
        nets=("small",),
        recipes=(
            "bn",
            "bn+wc",
            "bn+freeze",
            "cmbn-weights",
            "cmbn-weights+wc",
            "cmbn-weights+burn",
            "cmbn-carry+burn",
            "cmbn-share",
            "cmbn-renorm",
            "cmbn-darknet",
            "cbn-std",
            "cbn-std-weights",
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
        recipes=all_recipes(),
        mini_batches=(1, 2, 4, 8, 16),
        tuned_at=(1, 2, 16),
        rates=_RATES,
        seeds=range(1, 6),
        steps=4096,
        scenes=8192,
        mosaics=(False, True),
    ),
}
