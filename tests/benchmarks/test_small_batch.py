"""The study from its command line, at its smallest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import benchmarks.small_batch.sources as sources
from benchmarks.small_batch.__main__ import main
from benchmarks.small_batch.grid import BUDGETS, Cell
from benchmarks.small_batch.processes import run_cells
from benchmarks.small_batch.rows import read_rows
from utils.errors import UserError


@pytest.fixture(autouse=True)
def in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MADE", tmp_path / "made")


def test_a_grid_from_command_line_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--budget", "smoke", "--jobs", "0", "--minibatches", "16", "--out", str(tmp_path / "out")]
    main([*flags, "--time-limit", "0.0001"])
    main(flags)
    out = tmp_path / "out"
    first = capsys.readouterr().out
    assert [row["recipe"] for row in read_rows(out / "smoke.jsonl")] == ["bn", "cmbn"]
    main(flags)
    again = capsys.readouterr().out
    assert "cells to do" in first and "cells to do" not in again
    assert first.partition("digits-1, small net, mini-batch 16\n")[2] == again.partition("mini-batch 16\n")[2]
    assert {path.name for path in out.iterdir()} == {
        f"smoke{end}" for end in (".jsonl", ".json", ".md", "-mini-batches.png", "-images.png", "-gaps.png")
    }
    main([*flags, "--report-only", "--seeds", "2-3"])
    assert "no cell has a test result yet" in capsys.readouterr().out
    main([*flags, "--report-only", "--seeds", "1"])
    assert (out / "smoke-seeds-1-1.json").read_text() == (out / "smoke.json").read_text()
    rows = (out / "smoke.jsonl").read_text()
    (out / "smoke.jsonl").write_text(rows.replace('"device": "cpu"', '"device": "cuda: a large one"'))
    with pytest.raises(UserError, match=r"were made on cuda: a large one, this is cpu: choose another folder by --out"):
        main(flags)
    (out / "smoke.jsonl").write_text(rows)
    assert str(tmp_path) not in (out / "smoke.jsonl").read_text() + (out / "smoke.md").read_text()


@pytest.mark.parametrize("seeds", ["0", "5-4", "0-3", "some"])
def test_seeds_that_are_none_are_refused(seeds: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--report-only", "--seeds", seeds])
    assert leaving.value.code == 2


def ends(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return a row without training; mini-batches of 8 fail."""
    assert not folder.exists()
    print("about to end")
    if cell.mini_batch == 8:
        raise RuntimeError("not today")
    return asdict(cell)


@pytest.mark.parametrize("start_method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_processes_report_what_they_did_and_why_they_failed(start_method: str) -> None:
    cells = BUDGETS["smoke"].main_cells(())
    outcomes = list(run_cells(cells, ends, jobs=2, start_method=start_method))
    assert sorted(outcome.cell for outcome in outcomes) == sorted(cells)
    for outcome in outcomes:
        if outcome.cell.mini_batch == 8:
            assert outcome.row is None and "about to end" in outcome.log_tail and "not today" in outcome.log_tail
        else:
            assert json.loads(json.dumps(asdict(outcome.cell))) == outcome.row
