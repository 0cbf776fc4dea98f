"""The grid of a study: its cells in their order, and the learning rate of each norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from study.recipes import BN
from utils.errors import UserError

TUNE_SEED = 0  # not used by main cells

Row = Mapping[str, Any]


class Task(NamedTuple):
    """What is trained on what. data and net: names. mosaic: whether there are mosaics among the training images."""

    data: str
    net: str
    mosaic: bool

    @property
    def title(self) -> str:
        return f"{self.data}, {self.net}" + (", mosaic" if self.mosaic else "")


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

    @property
    def task(self) -> Task:
        return Task(self.data, self.net, self.mosaic)


CELL_FIELDS = tuple(Cell.__dataclass_fields__)


def cell_of(row: Row) -> Cell:
    return Cell(**{name: row[name] for name in CELL_FIELDS})


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The cells of a study: every recipe at every number of images per forward, with every seed.

    rates: learning rates to choose from, ascending; one alone is taken. own_rates: those of a recipe at a mini-batch,
    in their place. tuned_at: mini-batches at which rates are tuned, the nearest of which decides; () for all. steps:
    optimizer steps of a training, of batch_size images each.

    stand_in: (recipe, mini-batch) -> the recipe that is trained in its place. reference_of: recipe -> the one that it
    is compared with. borrowed: recipe -> the one that lends its rate until its own is tuned.
    """

    tasks: tuple[Task, ...]
    recipes: tuple[str, ...]
    mini_batches: tuple[int, ...]
    seeds: Sequence[int]
    steps: int
    batch_size: int
    rates: tuple[float, ...] = ()
    own_rates: Mapping[tuple[str, int], tuple[float, ...]] = field(default_factory=dict)
    tuned_at: tuple[int, ...] = ()
    scenes: int = 0
    stand_in: Callable[[str, int], str] = lambda recipe, _mini_batch: recipe
    reference_of: Callable[[str], str] = lambda _recipe: BN
    borrowed: Mapping[str, str] = field(default_factory=dict)

    def tune_cells(self) -> list[Cell]:
        """Return the tuning cells, for the mini-batches of this grid."""
        return _distinct(
            self._cell("tune", task, recipe, mini_batch, TUNE_SEED, rate)
            for task in self.tasks
            for mini_batch in sorted(set(map(self.tuned_near, self.mini_batches)))
            for recipe in self.recipes
            if len(rates := self.rates_of(recipe, mini_batch)) > 1
            for rate in rates
        )

    def main_cells(self, rows: Iterable[Row], *, untuned: float | None = None) -> list[Cell]:
        """Return the cells with a known rate, seed by seed, so that a stopped study has equally many of each recipe.

        untuned: stands for a rate that is not known yet; None leaves these cells out.
        """
        chosen = ChosenRates(self, rows)
        return _distinct(
            self._cell("main", task, recipe, mini_batch, seed, rate)
            for seed in self.seeds
            for task in self.tasks
            for mini_batch in self.mini_batches
            for recipe in self.recipes
            if (rate := chosen.of(task, recipe, mini_batch) or untuned) is not None
        )

    def tuned_near(self, mini_batch: int) -> int:
        """Return the mini-batch at which the rate for this one is chosen."""
        return nearest(mini_batch, self.tuned_at) if self.tuned_at else mini_batch

    def rates_of(self, recipe: str, mini_batch: int) -> tuple[float, ...]:
        return self.own_rates.get((recipe, mini_batch), self.rates)

    def _cell(self, role: str, task: Task, recipe: str, mini_batch: int, seed: int, rate: float) -> Cell:
        return Cell(
            role=role,
            **task._asdict(),
            recipe=self.stand_in(recipe, mini_batch),
            mini_batch=mini_batch,
            seed=seed,
            rate=rate,
            steps=self.steps,
            scenes=self.scenes if task.data.startswith("digits-") else 0,
        )


class ChosenRates:
    """The rate with the best AP on val among a recipe's tuning cells: one seed, the same rates for every seed."""

    def __init__(self, grid: Grid, rows: Iterable[Row]) -> None:
        self._grid = grid
        self._val_ap: dict[tuple[Task, str, int], dict[float, float]] = {}
        for row in rows:
            if row["role"] == "tune" and row["steps"] == grid.steps:
                cell = cell_of(row)
                self._val_ap.setdefault((cell.task, cell.recipe, cell.mini_batch), {})[cell.rate] = row["val_AP"]

    def of(self, task: Task, recipe: str, mini_batch: int) -> float | None:
        """Return the rate, None if its tuning is incomplete or the grid has none to choose from."""
        near, rates = self._tried(recipe, mini_batch)
        if len(rates) == 1:
            return rates[0]
        val_ap = self._val_ap.get((task, self._grid.stand_in(recipe, near), near), {})
        is_complete = rates and val_ap.keys() >= set(rates)
        return max(rates, key=lambda rate: val_ap[rate]) if is_complete else None

    def is_at_edge(self, recipe: str, mini_batch: int, rate: float) -> bool:
        """Return whether the rate is the smallest or largest that was tried, so that a better one may lie outside."""
        _, rates = self._tried(recipe, mini_batch)
        return len(rates) > 1 and rate in (rates[0], rates[-1])

    def _tried(self, recipe: str, mini_batch: int) -> tuple[int, tuple[float, ...]]:
        near = self._grid.tuned_near(mini_batch)
        return near, self._grid.rates_of(recipe, near)


def nearest(mini_batch: int, choices: Sequence[int]) -> int:
    """Return the choice nearest by ratio, the smaller of two."""
    return min(choices, key=lambda choice: (abs(math.log2(choice / mini_batch)), choice))


def check_forwards(batch: int, mini_batches: Iterable[int]) -> None:
    """Raise UserError if a batch cannot be cut into forwards of these sizes."""
    for images in mini_batches:
        if batch % images:
            raise UserError(f"--images-per-forward {images} does not divide a batch of {batch} images")


def left(cells: Iterable[Cell], rows: Iterable[Row]) -> Iterator[Cell]:
    """Yield the cells that have no row."""
    done = {cell_of(row) for row in rows}
    return (cell for cell in cells if cell not in done)


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Return each cell once, in order: several recipes may have one stand-in."""
    return list(dict.fromkeys(cells))
