"""From rows to tables: who is compared with whom, and what stands in the cells."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from study.grid import Cell, Row, Task
from study.presets import PRESETS
from study.report import Results, advice, json_report, leading, report
from study.rows import read_rows

TASK = Task("digits-1", "small", False)
GRID = replace(PRESETS["standard"], tasks=(TASK,), recipes=("bn", "cmbn", "cmbn:gradient=share"), steps=8)
MACHINES = [{"device": "cpu", "cpu": name} for name in ("one", "another")]


def row(recipe: str, mini_batch: int, seed: int, ap: float, **values: Any) -> Row:
    """Of a main cell at the rate .01, which tuning() chooses."""
    cell = Cell(
        role="main",
        data="digits-1",
        net="small",
        recipe=recipe,
        mini_batch=mini_batch,
        seed=seed,
        rate=0.01,
        mosaic=False,
        steps=8,
        scenes=0,
    )
    measured = {"val_AP": ap, "test_AP": ap, "test_AP50": ap, "diverged": False, "step_s": 1.0, "memory_MB": 4.0}
    of_run = {"commit": "abc", "date": "2026-01-01", "seconds": 60.0, "machine": MACHINES[0]}
    return {**asdict(cell), **measured, **of_run, **values}


def tuning(*recipes: str) -> list[Row]:
    return [
        row(recipe, at, 0, 0.9 if rate == 0.01 else 0.1, role="tune", rate=rate, test_AP=None)
        for recipe in recipes
        for at in (1, 16)
        for rate in GRID.rates
    ]


def several(recipe: str, mini_batch: int, *aps: float, **values: Any) -> list[Row]:
    """Seeds from 1 on."""
    return [row(recipe, mini_batch, seed, ap, **values) for seed, ap in enumerate(aps, start=1)]


TUNED = tuning("bn", "cmbn", "cmbn:gradient=share")
STUDY = [
    *several("cmbn:gradient=share", 1, 0.10, 0.12),
    *several("cmbn", 1, 0.40, 0.41, 0.42, 0.43, 0.44),
    *several("bn", 1, 0.20, 0.21, 0.22, 0.23, 0.24, 0.90),
    *several("bn", 16, 0.50, 0.51, 0.52, 0.53, 0.54),
    *several("cmbn", 16, 0.50, 0.51, 0.52, 0.53, 0.54),
]


def lines_of(rows: list[Row]) -> dict[tuple[str, int], Any]:
    return {(line.recipe, line.mini_batch): line for line in Results([*TUNED, *rows], GRID).lines()}


def test_gains_are_paired_by_seed_and_shares_are_of_the_gap() -> None:
    line = lines_of(STUDY)["cmbn", 1]
    assert (line.gain.seeds, line.gain.value, line.gain.p) == (5, pytest.approx(0.2), 1 / 32)
    assert line.gain.is_significant and line.share.value == pytest.approx(2 / 3)
    assert lines_of(STUDY)["bn", 1].gain is None and lines_of(STUDY)["bn", 1].ap.seeds == 6


def test_rows_at_another_rate_or_of_another_length_do_not_count() -> None:
    strange = [
        *several("cmbn", 1, *[0.9] * 5, rate=0.02),
        *several("cmbn", 1, *[0.9] * 5, steps=512),
        *several("cmbn", 1, *[0.9] * 5, role="tune"),
    ]
    assert lines_of([*STUDY, *strange]) == lines_of(STUDY)


def test_costs_are_compared_on_one_machine_only() -> None:
    elsewhere = [{**each, "machine": MACHINES[1]} for each in several("cmbn:gradient=share", 1, 0.1, 0.1, step_s=9.0)]
    here = several("cmbn:gradient=share", 1, 0.1, 0.1, step_s=3.0)
    bn = several("bn", 1, 0.2, 0.2)
    assert lines_of([*bn, *elsewhere])["cmbn:gradient=share", 1].time_ratio is None
    assert lines_of([*bn, *elsewhere[:1], *here[1:]])["cmbn:gradient=share", 1].time_ratio == 3


def test_figures_of_the_committed_rows_are_those_that_were_published(root: Path) -> None:
    folder = root / "benchmarks" / "results" / "small_batch"
    lines = Results(read_rows(folder / "standard.jsonl"), PRESETS["standard"]).lines()
    found, published = json.loads(json_report(lines)), json.loads((folder / "standard.json").read_text())
    assert len(published) >= 100 and [line["recipe"] for line in found] == [line["recipe"] for line in published]
    for line, before in zip(found, published, strict=True):
        for name, value in before.items():
            estimates = name in ("ap", "ap50", "gain", "share") and value is not None
            assert line[name] == (pytest.approx(value, abs=1e-9) if estimates else value), (line["recipe"], name)


def test_the_table_shows_recipes_in_the_grids_order_without_empty_columns() -> None:
    lines = list(lines_of(STUDY).values())
    text = report(lines, STUDY, title="Some", sentences=["Do it."], plot="a.png")
    table = text.partition("1 image in a forward\n\n")[2].partition("\n\n")[0].splitlines()
    cost = ["0.01", "1 (1.00)", "4 (1.00)"]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in (table[0], *table[2:])] == [
        ["norm", "seeds", "AP", "gain over bn", "p", "gap won back", "AP50", "rate", "s a step", "MB"],
        ["bn", "6", "33.3 [20.7, 67.5]", "", "", "", "33.3", *cost],
        ["cmbn", "5", "42.0 [40.2, 43.8]", "+20.0 [20.0, 20.0] *", "0.031", "67 [67, 67] %", "42.0", *cost],
        ["cmbn:gradient=share", "2", "11.0", "-9.5", "", "-32 %", "11.0", *cost],
    ]
    assert text.startswith("# Some\n\nDo it.\n\n") and "(a.png)" in text


def advice_of(*rows: Row) -> str:
    return "\n".join(advice(list(lines_of(list(rows)).values()), lambda recipe, _images, _rate: f"type {recipe}"))


def test_advice_needs_three_seeds_and_an_interval_above_zero() -> None:
    bn = several("bn", 1, 0.20, 0.22, 0.24)
    assert "are fewer than 3 seeds" in advice_of(*bn[:2], *several("cmbn", 1, 0.4, 0.4))
    few = advice_of(*bn, *several("cmbn", 1, 0.40, 0.42, 0.44))
    assert few.startswith("With 1 image in a forward cmbn is better than bn: +20.0 [20.0, 20.0] AP, which may be")
    assert few.endswith("    type cmbn")
    for worse in (several("cmbn", 1, 0.40, 0.42, 0.10), several("cmbn", 1, 0.1, 0.1, 0.1)):
        none = advice_of(*bn, *worse)
        assert "nothing was found to be better than bn" in none and none.endswith("    type bn")


def test_networks_that_have_not_learnt_are_not_compared() -> None:
    few = advice_of(*several("bn", 1, 0.001, 0.001, 0.001), *several("cmbn", 1, 0.03, 0.03, 0.03))
    assert "no norm reached 5 AP" in few and "type" not in few
    assert "cmbn is better" in advice_of(*several("bn", 1, 0.001, 0.001, 0.001), *several("cmbn", 1, 0.06, 0.06, 0.06))


def test_a_training_that_diverges_with_every_seed_is_not_advised() -> None:
    lost = [several(recipe, 1, 0, 0, 0, diverged=True) for recipe in ("bn", "cmbn")]
    assert advice_of(*lost[0], *lost[1]).endswith("every training diverged: try smaller learning rates, with --rates.")
    assert "type cmbn" in advice_of(*lost[0], *several("cmbn", 1, 0.1, 0.1, 0.1))


def test_advice_is_the_best_of_those_that_are_better() -> None:
    bn = several("bn", 1, *[0.2] * 5)
    noisy = several("cmbn:gradient=share", 1, 0.1, 0.9, 0.9, 0.9, 0.1)
    assert "type cmbn\n" in advice_of(*bn, *several("cmbn", 1, *[0.3] * 5), *noisy) + "\n"
    better = several("cmbn:gradient=share", 1, *[0.4] * 5)
    text = advice_of(*bn, *several("cmbn", 1, *[0.3] * 5), *better)
    assert text.endswith("type cmbn:gradient=share") and "accident" not in text


def test_plots_show_the_references_and_the_best() -> None:
    rows = [each for each in STUDY if (each["recipe"], each["mini_batch"]) != ("cmbn", 1)]
    assert leading(list(lines_of(rows).values()), 3) == ["bn", "cmbn", "cmbn:gradient=share"]
    better = several("cmbn:gradient=share", 1, 0.8)
    assert leading(list(lines_of([*STUDY, *better]).values()), 2) == ["bn", "cmbn:gradient=share"]
