"""Which cells, with which settings, at which rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cfg.plan import Plan, load_plan
from models.network import Network
from models.norms.cmbn import GRADIENTS
from models.norms.factory import norm_factory
from models.norms.table import NORMS
from study.grid import TUNE_SEED, Cell, Task, nearest
from study.presets import BATCH, PRESETS, reference_of, stand_in
from study.recipes import canonical, options_of, record_of, with_references
from study.rows import read_rows
from utils.clock import BatchClock
from utils.errors import UserError
from utils.seed import seed_everything

TASKS = tuple(Task(name, "small", False) for name in ("digits-0.4", "bccd"))
TOY = replace(
    PRESETS["standard"],
    tasks=TASKS,
    recipes=("bn", "gn"),
    mini_batches=(1, 4),
    tuned_at=(1,),
)
NORM_RECIPES = [
    *(name for name in NORMS if name not in ("syncbn", "frozen", "none")),
    *(f"cmbn:gradient={gradient}" for gradient in GRADIENTS[1:]),
    *("cmbn:carry", "cmbn:burn_in_steps=1", "cmbn:carry,burn_in_steps=1", "cbn:gradient=share", "gn:groups=8"),
]


@pytest.fixture
def plan(root: Path) -> Plan:
    return load_plan(str(root / "study" / "small.cfg"))


def tuned(cell: Cell, val_ap: float) -> Mapping[str, Any]:
    return {**asdict(cell), "val_AP": val_ap, "test_AP": None}


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_of_a_preset_are_canonical_with_a_burn_in_of_at_most_a_tenth(name: str) -> None:
    grid = PRESETS[name]
    assert set(grid.recipes) == set(with_references(grid.recipes, reference_of)), "the BN that it is compared with"
    for recipe in grid.recipes:
        assert canonical(recipe, from_weights=False) == recipe
        assert options_of(recipe).spec.for_training(grid.steps).burn_in <= grid.steps // 10
    cells = replace(grid, rates=(0.01,), own_rates={}).main_cells(())
    assert TUNE_SEED not in {cell.seed for cell in cells}
    assert len({(cell.steps, BATCH % cell.mini_batch) for cell in cells}) == 1, "all see equally many images"


def test_committed_rows_have_recipes_to_type_that_agree_with_their_settings(root: Path) -> None:
    rows = read_rows(root / "benchmarks" / "results" / "small_batch" / "standard.jsonl")
    assert len(rows) >= 771
    for row in rows:
        assert canonical(row["recipe"], from_weights=False) == row["recipe"]
        settings = record_of(options_of(row["recipe"]))  # of today, when there may be more of them
        assert {name: settings[name] for name in row["settings"]} == row["settings"]


def test_a_recipe_has_one_spelling_and_a_reference() -> None:
    spellings = {
        "cbn:burn_in_steps=51,gradient=share,window=4": "cbn:gradient=share,burn_in_steps=51",
        "bn --precise-bn 512 --weight-centralization": "bn --weight-centralization --precise-bn 512",
        "mabn --weight-centralization": "mabn",
    }
    assert [canonical(recipe, from_weights=False) for recipe in spellings] == list(spellings.values())
    assert reference_of("mabn") == reference_of("cmbn:gradient=share --weight-centralization")
    assert with_references(("gn", "mabn"), reference_of) == ("bn", "bn --weight-centralization", "gn", "mabn")


@pytest.mark.parametrize(
    "recipe", ["", "bm", "cmbn-weights", "gn --norm-freeze-after 0.7", "bn --clip-norm 10", "frozen", "bn --norm-eval"]
)
def test_what_is_no_recipe_is_refused(recipe: str) -> None:
    with pytest.raises(UserError):
        canonical(recipe, from_weights=False)


@pytest.mark.parametrize("recipe", ["frozen", "bn --norm-eval", "bn --norm-freeze-after 0"])
def test_statistics_that_stay_need_weights(recipe: str) -> None:
    assert canonical(recipe, from_weights=True).startswith(recipe[:14])
    with pytest.raises(UserError, match="--weights"):
        canonical(recipe, from_weights=False)


def test_all_norms_start_from_the_same_weights(plan: Plan) -> None:
    weights = set()
    for recipe in NORM_RECIPES:
        seed_everything(3)
        network = Network(plan, norm_factory(options_of(recipe)))
        convs = [m.weight.detach().flatten() for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        weights.add(torch.cat(convs).numpy().tobytes())
    assert len(weights) == 1


def train_on_single_mini_batches(plan: Plan, recipe: str) -> dict[str, torch.Tensor]:
    """Return the state after four steps on batches that are one mini-batch each, the first of them a burn-in."""
    seed_everything(3)
    network = Network(plan, norm_factory(options_of(recipe))).train()
    clock, optimizer = BatchClock(network), torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(4):
        for images in clock.minibatches([torch.rand(4, 3, 96, 96)]):
            sum(head.logits.square().mean() for head in network(images)).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.stepped()
    return network.state_dict()


def test_a_stand_in_is_the_same_to_the_last_bit(plan: Plan) -> None:
    recipes = [recipe for recipe in NORM_RECIPES if recipe != stand_in(recipe, BATCH)]
    assert len(recipes) >= 4 and {stand_in(recipe, BATCH) for recipe in recipes} == {"cmbn"}
    expected = train_on_single_mini_batches(plan, "cmbn")
    for recipe in recipes:
        state = train_on_single_mini_batches(plan, recipe)
        assert all(torch.equal(value, state[name]) for name, value in expected.items()), recipe
    darknet = train_on_single_mini_batches(plan, "cmbn:gradient=darknet")
    assert not torch.equal(expected["layers.0.conv.weight"], darknet["layers.0.conv.weight"])
    assert stand_in("cmbn:carry --norm-freeze-after 0.7", BATCH) == "cmbn --norm-freeze-after 0.7"
    assert stand_in("cmbn:carry", 8) == "cmbn:carry"


def test_a_stand_in_is_trained_once_and_lends_its_rate() -> None:
    recipes = ("bn", "cmbn:gradient=share", "cmbn:carry")
    grid = replace(TOY, recipes=recipes, mini_batches=(1, 16), tuned_at=(1, 16))
    cells = grid.tune_cells()
    assert {cell.recipe for cell in cells if cell.mini_batch == 16} == {"bn", "cmbn"}
    assert {cell.recipe for cell in cells if cell.mini_batch == 1} == set(recipes)
    main = grid.main_cells([tuned(cell, 0.5) for cell in cells])
    assert {cell.recipe for cell in main if cell.mini_batch == 16} == {"bn", "cmbn"}
    assert len(set(main)) == len(main)


def test_the_rate_is_chosen_on_val_by_data_and_recipe_once_its_tuning_is_complete() -> None:
    rows = [
        tuned(cell, 0.5 if cell.rate == (0.02 if cell.recipe == "gn" else 0.01) else 0.4) for cell in TOY.tune_cells()
    ]
    rates = {(cell.task, cell.recipe): cell.rate for cell in TOY.main_cells(rows)}
    assert rates == {(task, recipe): 0.02 if recipe == "gn" else 0.01 for task in TASKS for recipe in TOY.recipes}
    assert ("bccd", "gn") not in {(cell.data, cell.recipe) for cell in TOY.main_cells(rows[:-1])}
    assert len(TOY.main_cells(rows[:-1], untuned=0.0)) == len(TOY.main_cells(rows))
    assert [nearest(mini_batch, (16, 1, 2)) for mini_batch in (1, 2, 4, 8, 16)] == [1, 2, 2, 16, 16]


def test_the_quick_trainings_are_among_the_standard_ones() -> None:
    standard, best = PRESETS["standard"], {("cmbn", 1): 0.02}
    rows = [
        tuned(cell, 0.9 if cell.rate == best.get((cell.recipe, cell.mini_batch), 0.01) else 0.1)
        for cell in standard.tune_cells()
    ]
    assert set(PRESETS["quick"].main_cells(())) <= set(standard.main_cells(rows))


def test_one_rate_is_taken_without_tuning_and_each_recipe_may_have_its_own() -> None:
    grid = replace(TOY, tuned_at=(), rates=(0.01,), own_rates={("gn", 4): (0.001, 0.003)})
    tuned_at = [(cell.recipe, cell.mini_batch, cell.rate) for cell in grid.tune_cells()]
    assert sorted(set(tuned_at)) == [("gn", 4, 0.001), ("gn", 4, 0.003)]
    assert {cell.rate for cell in grid.main_cells(())} == {0.01}
    rows = [tuned(cell, cell.rate) for cell in grid.tune_cells()]
    assert {cell.rate for cell in grid.main_cells(rows) if (cell.recipe, cell.mini_batch) == ("gn", 4)} == {0.003}
