"""From rows to tables: who is compared with whom, and what stands in the cells."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from benchmarks.small_batch.grid import BUDGETS, Cell
from benchmarks.small_batch.report import Results, Row, leading, markdown_report, text_report

GRID = replace(BUDGETS["standard"], data=("digits-1",), recipes=("bn", "cmbn", "cmbn:gradient=share"), steps=8)
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
        for rate in GRID.rates["small"]
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


def test_the_overview_shows_recipes_in_the_grids_order_and_who_stands_in() -> None:
    lines = list(lines_of(STUDY).values())
    text = markdown_report(lines, STUDY, title="Some", images=["a.png"])
    overview = text.partition("\n\nAP on the test split")[0].splitlines()
    assert overview[-4:] == [
        "| --- | --- | --- |",
        "| `bn` | 33.3 | 52.0 (5) |",
        "| `cmbn` | **42.0 (5)** [+20.0, +20.0] | 52.0 (5) [+0.0, +0.0] |",
        "| `cmbn:gradient=share` | 11.0 (2) [-10.0, -9.0] | as `cmbn` |",
    ]
    assert "\ncmbn:gradient=share  0.01" in text_report(lines, STUDY)


def test_plots_show_recipes_that_only_larger_mini_batches_have_and_who_stands_in() -> None:
    rows = [each for each in STUDY if (each["recipe"], each["mini_batch"]) != ("cmbn", 1)]
    assert leading(list(lines_of(rows).values())) == {"bn", "cmbn", "cmbn:gradient=share"}
    better = several("cmbn:gradient=share", 1, 0.8)
    assert leading(list(lines_of([*STUDY, *better]).values()), most=2) == {"bn", "cmbn:gradient=share", "cmbn"}
