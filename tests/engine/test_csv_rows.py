"""results.csv after a crash: whole rows stay, what will be trained again goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.csv_rows import CsvRows
from engine.result_files import COLUMNS

HEADER = ",".join(COLUMNS)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture
def three_epochs(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    CsvRows(path, COLUMNS).add({"step": 10 * epoch, "epoch": epoch, "lr": 0.1} for epoch in (1, 2, 3))
    return path


@pytest.mark.parametrize(
    ("epochs", "left"), [(0, []), (2, ["10", "20"]), (3, ["10", "20", "30"]), (9, ["10", "20", "30"])]
)
def test_rows_of_later_epochs_go(three_epochs: Path, epochs: int, left: list[str]) -> None:
    CsvRows(three_epochs, COLUMNS).drop_after(epochs)
    header, *rows = lines_of(three_epochs)
    assert header == HEADER and [row.split(",")[0] for row in rows] == left


@pytest.mark.parametrize(
    "content",
    ["", "\n", HEADER, HEADER[:7], HEADER + "\n10,1,0.", HEADER + "\n10,²,,,,,,,,", "no header\n1,2\n", "\x00\xff"],
)
def test_what_a_crash_has_left_is_no_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(content)
    rows = CsvRows(path, COLUMNS)
    rows.drop_after(5)
    rows.add([{"step": 20, "epoch": 2, "AP": None}])
    assert lines_of(path) == [HEADER, "20,2" + "," * (len(COLUMNS) - 2)]


def test_a_missing_row_does_not_take_another_along(three_epochs: Path) -> None:
    first, _, *others = lines_of(three_epochs)
    three_epochs.write_text("\n".join([first, *others]) + "\n")  # epoch 1 was lost
    CsvRows(three_epochs, COLUMNS).drop_after(2)
    assert [row.split(",")[1] for row in lines_of(three_epochs)[1:]] == ["2"]


def test_no_file_is_no_error(tmp_path: Path) -> None:
    CsvRows(tmp_path / "results.csv", COLUMNS).drop_after(1)
    assert not (tmp_path / "results.csv").exists()


def test_a_column_nobody_knows_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="colour"):
        CsvRows(tmp_path / "results.csv", COLUMNS).add([{"epoch": 1, "colour": 3}])
