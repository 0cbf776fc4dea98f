"""The tables of benchmarks/recipes.py, from rows made by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.recipes import basins, table


def row(rate: str, learning_rate: float, seed: int, ap: float, **other: Any) -> dict[str, Any]:
    cell = {"data": "bccd", "cfg": "c", "weights": "", "image_size": 160, "epochs": 12, "optimizer": "auto"}
    cell |= {"rate": rate, "forwards": "default", "norm": "bn", "seed": seed, "learning_rate": learning_rate}
    return {**cell, "val_AP": ap, "test_AP": ap / 2, "test_AP50": ap, "seconds": 10.0, "diverged": ap == 0, **other}


def test_a_line_has_the_means_over_seeds() -> None:
    head, line = table([row("default", 0.003, 0, 0.2), row("default", 0.003, 1, 0.4)]).splitlines()
    assert head.split() == ["seeds", "diverged", "val", "AP", "test", "AP", "(lowest,", "highest)", "AP50", "seconds"]
    assert line == (
        "bccd, scratch: --epochs 12 --norm bn --optimizer auto      2         0    30.0     15.0  (10.0, 20.0)"
        "       30.0       10"
    )


def test_the_basin_counts_rates_near_the_best_by_val_over_common_seeds() -> None:
    rows = [row(str(rate), rate, 0, ap) for rate, ap in ((0.001, 0.28), (0.003, 0.3), (0.01, 0.2), (0.1, 0.0))]
    rows.append(row("0.1", 0.1, 1, 0.9))  # of a seed that the others lack
    assert basins(rows) == (
        "bccd, scratch: --epochs 12 --norm bn --optimizer auto: 2 of 4 rates within 10 % of the best, 0.003; "
        "0.001: 0.93, 0.003: 1.00, 0.01: 0.67, 0.1: 0.00"
    )


def test_two_rates_are_no_basin() -> None:
    assert basins([row("0.1", 0.1, 0, 0.5), row("0.2", 0.2, 0, 0.5)]) == "" == basins([])
