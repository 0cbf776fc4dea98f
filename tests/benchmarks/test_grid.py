"""Which cells, with which settings, at which rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from benchmarks.small_batch.grid import BATCH, BUDGETS, TUNE_SEED, Cell, Grid, nearest, stand_in
from benchmarks.small_batch.plots import _style
from benchmarks.small_batch.progress import Progress
from benchmarks.small_batch.recipes import (
    BASES,
    all_recipes,
    options_of,
    reference_of,
    settings_of,
    typed,
    with_references,
)
from benchmarks.small_batch.sources import half_width
from cfg.plan import Plan, load_plan, parse_plan
from models.network import Network
from models.norms.table import norm_factory
from options import TrainOptions
from utils.clock import BatchClock
from utils.errors import UserError
from utils.flags import parse_flags
from utils.seed import seed_everything

TOY = replace(
    BUDGETS["full"],
    data=("digits-0.4", "bccd"),
    nets=("small",),
    recipes=("bn", "gn"),
    mini_batches=(1, 4),
    tuned_at=(1,),
    mosaics=(False,),
)


def tuned(cell: Cell, val_ap: float) -> Mapping[str, Any]:
    return {**asdict(cell), "val_AP": val_ap, "test_AP": None}


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_cell_of_a_budget_can_be_built(budget: str) -> None:
    grid = BUDGETS[budget]
    assert set(grid.recipes) == set(with_references(grid.recipes)), "the BN that a recipe is compared with"
    for recipe in grid.recipes:
        options_of(recipe, steps=grid.steps)
    assert all(BATCH % mini_batch == 0 for mini_batch in grid.mini_batches)


def test_every_recipe_has_a_line_in_the_plots() -> None:
    assert len({str(_style(recipe)) for recipe in all_recipes()}) > len(BASES) / 2


def test_all_norms_and_mini_batches_start_from_the_same_weights(root: Any) -> None:
    plan = load_plan(str(root / "benchmarks" / "small_batch" / "small.cfg"))
    found = set()
    for recipe in all_recipes():
        seed_everything(3)
        network = Network(plan, norm_factory(options_of(recipe, steps=100)))
        weights = [m.weight.detach().flatten() for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        found.add(torch.cat(weights).numpy().tobytes())
    assert len(found) == 1


def test_cells_are_paired_and_see_as_many_images() -> None:
    cells = replace(BUDGETS["standard"], tuned_at=()).main_cells(())
    groups: dict[tuple[Any, ...], set[tuple[int, int]]] = {}
    for cell in cells:
        groups.setdefault((cell.data, cell.recipe, cell.mini_batch), set()).add((cell.seed, cell.steps))
    assert len({frozenset(group) for group in groups.values()}) == 1
    assert TUNE_SEED not in {cell.seed for cell in cells}
    assert len(set(cells)) == len(cells)


def test_the_rate_is_chosen_on_val_by_data_and_recipe() -> None:
    rows = [
        tuned(cell, 0.5 if cell.rate == (0.02 if cell.recipe == "gn" else 0.01) else 0.4) for cell in TOY.tune_cells()
    ]
    assert {cell.data for cell in TOY.tune_cells()} == {"digits-0.4", "bccd"}, "one shift is no other"
    rates = {(cell.data, cell.recipe): cell.rate for cell in TOY.main_cells(rows)}
    assert rates == {(data, recipe): 0.02 if recipe == "gn" else 0.01 for data in TOY.data for recipe in TOY.recipes}


def test_a_recipe_waits_for_its_tuning() -> None:
    rows = [tuned(cell, 0.5) for cell in TOY.tune_cells() if cell.recipe == "bn"]
    assert {cell.recipe for cell in TOY.main_cells(rows[:-1])} == {"bn"}
    assert {cell.data for cell in TOY.main_cells(rows[:-1])} == {"digits-0.4"}


def test_without_a_tuning_a_known_rate_holds_or_the_middle_one() -> None:
    quick = BUDGETS["quick"].main_cells(())
    assert {(cell.recipe, cell.mini_batch) for cell in quick if cell.rate == 0.02} == {("cmbn-weights", 1)}
    assert {cell.rate for cell in quick} == {0.01, 0.02}


def test_the_quick_trainings_are_among_the_standard_ones() -> None:
    standard = BUDGETS["standard"]
    best = {("cmbn-weights", 1): 0.02}
    rows = [
        tuned(cell, 0.9 if cell.rate == best.get((cell.recipe, cell.mini_batch), 0.01) else 0.1)
        for cell in standard.tune_cells()
    ]
    assert set(BUDGETS["quick"].main_cells(())) <= set(standard.main_cells(rows))


def test_only_the_mini_batches_of_the_grid_are_tuned() -> None:
    def tuned_at(*mini_batches: int) -> set[int]:
        return {cell.mini_batch for cell in replace(TOY, tuned_at=(1, 16), mini_batches=mini_batches).tune_cells()}

    assert tuned_at(2) == {1} and tuned_at(8, 16) == {16} and tuned_at(1, 8) == {1, 16}


def trained_at_once(plan: Plan, recipe: str) -> dict[str, torch.Tensor]:
    """The state after four steps on batches that are one mini-batch each, the first of them a burn-in."""
    seed_everything(3)
    network = Network(plan, norm_factory(options_of(recipe, steps=10))).train()
    clock, optimizer = BatchClock(network), torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(4):
        for images in clock.minibatches([torch.rand(4, 3, 96, 96)]):
            sum(head.logits.square().mean() for head in network(images)).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.stepped()
    return network.state_dict()


def test_a_stand_in_is_the_same_to_the_last_bit(root: Any) -> None:
    plan = load_plan(str(root / "benchmarks" / "small_batch" / "small.cfg"))
    replaced: dict[str, list[str]] = {}
    for recipe in all_recipes():
        if recipe != stand_in(recipe, BATCH) and "+precise" not in recipe and "+freeze" not in recipe:
            replaced.setdefault(stand_in(recipe, BATCH), []).append(recipe)
    assert set(replaced) == {"cmbn-weights", "cmbn-weights+wc"}
    for stands_in, recipes in replaced.items():
        expected = trained_at_once(plan, stands_in)
        for recipe in recipes:
            found = trained_at_once(plan, recipe)
            assert all(torch.equal(value, found[name]) for name, value in expected.items()), recipe
    assert not torch.equal(
        *(trained_at_once(plan, f"cmbn-{name}")["layers.0.conv.weight"] for name in ("weights", "darknet"))
    )


def test_a_stand_in_is_trained_once_and_lends_its_rate() -> None:
    grid = replace(TOY, recipes=("bn", "cmbn-share", "cmbn-carry+burn"), mini_batches=(1, 16), tuned_at=(1, 16))
    cells = grid.tune_cells()
    assert {cell.recipe for cell in cells if cell.mini_batch == 16} == {"bn", "cmbn-weights"}
    assert {cell.recipe for cell in cells if cell.mini_batch == 1} == {"bn", "cmbn-share", "cmbn-carry+burn"}
    main = grid.main_cells([tuned(cell, 0.5) for cell in cells])
    assert {cell.recipe for cell in main if cell.mini_batch == 16} == {"bn", "cmbn-weights"}
    assert len(set(main)) == len(main)
    assert stand_in("cmbn-renorm+freeze", 8) == "cmbn-renorm+freeze" and stand_in("cbn-std", 16) == "cbn-std"


@pytest.mark.parametrize(("mini_batch", "choice"), [(1, 1), (2, 2), (4, 2), (8, 16), (16, 16)])
def test_a_rate_comes_from_the_nearest_mini_batch(mini_batch: int, choice: int) -> None:
    assert nearest(mini_batch, (16, 1, 2)) == choice


def test_a_recipe_is_a_base_and_additions() -> None:
    assert settings_of("cmbn-weights+wc+freeze", steps=100) == {
        "norm": "cmbn",
        "norm_gradient": "weights",
        "weight_centralization": True,
        "norm_freeze_after": 0.7,
    }
    assert settings_of("brn", steps=200)["norm_burn_in_steps"] == 20
    assert reference_of("mabn") == reference_of("cmbn-share+wc") == "bn+wc"
    assert with_references(("gn", "mabn")) == ("bn", "bn+wc", "gn", "mabn")


def test_a_recipe_can_be_typed() -> None:
    assert typed("cmbn-carry+burn", steps=512) == "--norm cmbn --norm-carry --norm-burn-in-steps 51"
    assert typed("bn+freeze", steps=512) == "--norm bn --norm-freeze-after 0.7"
    for recipe in all_recipes():
        flags = parse_flags(TrainOptions, typed(recipe, steps=512).split())
        assert flags == settings_of(recipe, steps=512)


@pytest.mark.parametrize(
    "recipe", ["", "bm", "bn+", "bn+wc+wc", "bn+warm", "gn+freeze", "gn+precise", "mabn+wc", "frozen"]
)
def test_what_is_no_recipe_is_refused(recipe: str) -> None:
    with pytest.raises(UserError):
        options_of(recipe, steps=100)


def test_half_the_width_keeps_the_heads() -> None:
    whole = load_plan("yolov4")
    half = parse_plan(half_width(whole.source_text), path="half.cfg")
    assert half.parameter_count() < 0.3 * whole.parameter_count()
    assert [half.nodes[at].shape for at in half.heads] == [whole.nodes[at].shape for at in whole.heads]


def test_the_time_left_follows_cells_alike() -> None:
    grid: Grid = replace(TOY, tuned_at=(), seeds=(1,))
    cells = grid.main_cells(())
    seconds = {1: 3600.0, 4: 600.0}
    progress = Progress(cells, (), jobs=2)
    for cell in cells[:-2]:
        row = {**asdict(cell), "seconds": seconds[cell.mini_batch], "test_AP": 0.1, "diverged": False}
        said = progress.done(cell, row)
    assert [cell.mini_batch for cell in cells[-2:]] == [4, 4]
    assert said.endswith("; 0:10 left")
