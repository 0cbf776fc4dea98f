"""results.csv after a crash: whole rows stay, what will be trained again goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine.results_csv import COLUMNS, add_row, drop_rows_after

HEADER = ",".join(COLUMNS)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture
def three_epochs(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    for epoch in (1, 2, 3):
        add_row(path, {"step": 10 * epoch, "epoch": epoch, "lr": 0.1})
    return path


@pytest.mark.parametrize(
    ("epochs", "left"), [(0, []), (2, ["10", "20"]), (3, ["10", "20", "30"]), (9, ["10", "20", "30"])]
)
def test_rows_of_later_epochs_go(three_epochs: Path, epochs: int, left: list[str]) -> None:
    drop_rows_after(three_epochs, epochs)
    header, *rows = lines_of(three_epochs)
    assert header == HEADER and [row.split(",")[0] for row in rows] == left


@pytest.mark.parametrize(
    "content",
    ["", "\n", HEADER, HEADER[:7], HEADER + "\n10,1,0.", HEADER + "\n10,²,,,,,,,,", "no header\n1,2\n", "\x00\xff"],
)
def test_what_a_crash_has_left_is_no_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(content)
    drop_rows_after(path, 5)
    add_row(path, {"step": 20, "epoch": 2})
    assert lines_of(path) == [HEADER, "20,2" + "," * (len(COLUMNS) - 2)]


def test_a_missing_row_does_not_take_another_along(three_epochs: Path) -> None:
    first, _, *others = lines_of(three_epochs)
    three_epochs.write_text("\n".join([first, *others]) + "\n")  # epoch 1 was lost
    drop_rows_after(three_epochs, 2)
    assert [row.split(",")[1] for row in lines_of(three_epochs)[1:]] == ["2"]


def test_no_file_is_no_error(tmp_path: Path) -> None:
    drop_rows_after(tmp_path / "results.csv", 1)
    assert not (tmp_path / "results.csv").exists()
