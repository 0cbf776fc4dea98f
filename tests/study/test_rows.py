"""A grid that was killed goes on: no cell lost, none repeated."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from study.grid import cell_of, left
from study.presets import PRESETS
from study.processes import run_cells
from study.rows import RowFile, read_rows
from utils.errors import UserError


def run_without_training(path: Path, dies_after: int) -> None:
    """The cells of the quick study; dies outright with a line half written."""
    with RowFile(path) as file:
        waiting = list(left(PRESETS["quick"].main_cells(()), file.rows))
        for outcome in run_cells(waiting, lambda cell, folder: asdict(cell), jobs=0):
            if len(file.rows) == dies_after:
                with open(path, "a") as unfinished:
                    unfinished.write('{"role": "main", "da')
                os.kill(os.getpid(), signal.SIGKILL)
            assert outcome.row is not None
            file.append(outcome.row)


def test_a_killed_grid_neither_repeats_nor_loses_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    cells = PRESETS["quick"].main_cells(())
    for dies_after, code, rows in ((3, -signal.SIGKILL, 3), (-1, 0, len(cells))):
        grid = multiprocessing.get_context("fork").Process(target=run_without_training, args=(path, dies_after))
        grid.start()
        grid.join()
        assert (grid.exitcode, len(read_rows(path))) == (code, rows)
    assert sorted(map(cell_of, read_rows(path))) == sorted(cells)


def test_an_unfinished_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a":')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    with RowFile(path) as file:
        file.append({"a": 3})
        assert [row["a"] for row in file.rows] == [1, 2, 3]
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        RowFile(path)


@pytest.mark.parametrize("new", [None, '{"a": 1}\n', '{"a": 7}\n{"a": 1}\n'])
def test_a_file_that_was_replaced_gets_the_rows_that_it_lacks(new: str | None, tmp_path: Path) -> None:
    """As by `git stash` while a grid runs, and by `git pull`, which may bring rows of another machine."""
    path = tmp_path / "rows.jsonl"
    with RowFile(path) as file:
        file.append({"a": 1})
        file.append({"a": 2})
        path.unlink()
        if new is not None:
            path.write_text(new)
        file.append({"a": 3})
        kept = [json.loads(line) for line in (new or "").splitlines()]
        rows = kept + [row for row in ({"a": 1}, {"a": 2}, {"a": 3}) if row not in kept]
        assert read_rows(path) == file.rows == rows
        file.append({"a": 4})
        assert read_rows(path) == [*rows, {"a": 4}]


def test_a_row_for_a_damaged_file_is_not_lost(tmp_path: Path) -> None:
    """As by conflict markers of `git stash pop`."""
    path = tmp_path / "rows.jsonl"
    with RowFile(path) as file:
        file.append({"a": 1})
        path.unlink()
        path.write_text("<<<<<<< Updated upstream\n")
        with pytest.raises(UserError, match=r'rows.jsonl:1: .*this row is not in it: {"a": 2}'):
            file.append({"a": 2})
        path.write_text("")
        file.append({"a": 2})
    assert read_rows(path) == [{"a": 1}, {"a": 2}]


def test_two_grids_do_not_share_a_file(tmp_path: Path) -> None:
    with RowFile(tmp_path / "rows.jsonl"), pytest.raises(UserError, match="another grid"):
        RowFile(tmp_path / "rows.jsonl")
    with RowFile(tmp_path / "rows.jsonl") as file:
        assert file.rows == []
