"""The tables and the plot of benchmarks/small_batch.py, from rows made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.small_batch import by_setting, is_plotted, plot, table, title


def row(norm: str, forwards: int, seed: int, ap: float, **other: Any) -> dict[str, Any]:
    cell = {"data": "bccd", "cfg": "c.cfg", "weights": "w.weights", "image_size": 160, "epochs": 12}
    cell |= {"optimizer": "auto", "rate": "default", "norm": norm, "seed": seed, "test_AP": ap}
    return {
        **cell,
        "batch_size": 16,
        "subdivisions": forwards,
        "flags": f"--batch-size 16 --subdivisions {forwards}",
    } | other


ROWS = [
    *(row("bn", 16, seed, ap) for seed, ap in enumerate((0.30, 0.32, 0.34))),
    *(row("cmbn:carry", 16, seed, ap) for seed, ap in enumerate((0.35, 0.37, 0.39))),
    *(row("bn", 1, seed, ap) for seed, ap in enumerate((0.40, 0.41, 0.42))),
]


def test_differences_are_paired_by_seed_at_the_same_number_of_images() -> None:
    ((_, cells),) = by_setting(ROWS).items()
    assert table(cells).splitlines() == [
        "| `--norm` | 1 in a forward | 16 in a forward |",
        "|---|---|---|",
        "| `bn` | 32.0 [30.0, 34.0] (3) | 41.0 [40.0, 42.0] (3) |",
        "| `cmbn:carry` | 37.0 [35.0, 39.0] (3), +5.0 [+5.0, +5.0] |  |",
    ]


def test_other_flags_and_rates_are_recipes_of_their_own_and_other_batches_are_left_out() -> None:
    rows = [row("bn", 16, 0, 0.3, flags="--amp off"), row("bn", 16, 0, 0.4, rate="0.004", flags="")]
    ((_, cells),) = by_setting([*rows, row("bn", 1, 0, 0.5, batch_size=8)]).items()
    assert cells == {("bn --amp off", 1): {0: 30.0}, ("bn --learning-rate 0.004", 1): {0: 40.0}}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({}, "bccd from w.weights, 160 px, 12 epochs"),
        ({"weights": "", "optimizer": "sgd"}, "bccd c from scratch, 160 px, 12 epochs, --optimizer sgd"),
    ],
)
def test_a_setting_is_named_by_what_is_typed(other: dict[str, str], expected: str) -> None:
    assert [title(setting) for setting in by_setting([row("bn", 1, 0, 0.5, **other)])] == [expected]


def test_a_setting_is_drawn_once_both_lines_have_three_seeds(tmp_path) -> None:
    (few,), (enough,) = by_setting(ROWS[1:]).values(), by_setting(ROWS).items()
    assert not is_plotted(few) and is_plotted(enough[1])
    plot([enough], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
