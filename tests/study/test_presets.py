"""A built-in study from its command line, at its smallest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import study.presets as presets
from study.__main__ import main
from study.grid import Cell
from study.presets import PRESETS
from study.processes import run_cells
from study.rows import read_rows


@pytest.fixture(autouse=True)
def in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "MADE", tmp_path / "made")


def test_a_preset_from_command_line_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--preset", "smoke", "--jobs", "0", "--images-per-forward", "16", "--out", str(out)]
    main([*flags, "--hours", "1e-9"])
    assert "2 trainings are left" in capsys.readouterr().out and read_rows(out / "smoke.jsonl") == []
    main(flags)
    first = capsys.readouterr().out
    assert [row["recipe"] for row in read_rows(out / "smoke.jsonl")] == ["bn", "cmbn"]
    main(flags)
    again = capsys.readouterr().out
    assert "[2/2]" in first and "[1/" not in again
    assert first.partition("# Study smoke")[2] == again.partition("# Study smoke")[2] != ""
    assert {path.name for path in out.iterdir()} == {f"smoke.{end}" for end in ("jsonl", "json", "md", "png")}
    main([*flags, "--report-only", "--seeds", "2-3"])
    assert "no training has a test result yet" in capsys.readouterr().out
    assert str(tmp_path) not in (out / "smoke.jsonl").read_text() + (out / "smoke.md").read_text()


def ends(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return a row without training; mini-batches of 8 fail."""
    assert not folder.exists()
    print("about to end")
    if cell.mini_batch == 8:
        raise RuntimeError("not today")
    return asdict(cell)


@pytest.mark.parametrize("start_method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_processes_report_what_they_did_and_why_they_failed(start_method: str) -> None:
    cells = PRESETS["smoke"].main_cells(())
    outcomes = list(run_cells(cells, ends, jobs=2, start_method=start_method))
    assert sorted(outcome.cell for outcome in outcomes) == sorted(cells)
    for outcome in outcomes:
        if outcome.cell.mini_batch == 8:
            assert outcome.row is None and "about to end" in outcome.log_tail and "not today" in outcome.log_tail
        else:
            assert json.loads(json.dumps(asdict(outcome.cell))) == outcome.row
