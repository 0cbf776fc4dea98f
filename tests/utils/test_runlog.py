"""The folder of a run, and what is written there."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.runlog import COLUMNS, RunLog, free_folder


def test_the_default_folder_gets_a_number_when_taken(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = free_folder(None, default="digits-pico-bn")
        assert folder.is_dir()
        names.append(str(folder))
    assert names == [str(Path("runs") / f"digits-pico-bn{suffix}") for suffix in ("", "-2", "-3")]


def test_a_typed_folder_is_taken_as_it_is_when_free(tmp_path: Path):
    assert free_folder(str(tmp_path / "new"), default="x") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert free_folder(str(tmp_path / "empty"), default="x") == tmp_path / "empty"


def test_a_typed_folder_that_holds_something_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=f"^{taken}: is there already"):
            free_folder(str(taken), default="x")


@pytest.fixture
def log(tmp_path: Path):
    made = RunLog(tmp_path / "run", total_steps=4)
    yield made
    made.close()


def rows_of(log: RunLog) -> list[dict[str, str]]:
    with open(log.folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_results_have_their_header_once_and_absent_columns_stay_empty(log, tmp_path: Path):
    log.epoch({"step": 10, "epoch": 1, "lr": 0.1234567891, "loss": 3.0})
    log.epoch({"step": 20, "epoch": 2, "lr": 0.1, "loss": 2.0, "AP": 0.25, "AP50": 0.5})
    resumed = RunLog(log.folder, total_steps=4, first_step=2)
    resumed.epoch({"step": 30, "epoch": 3})
    resumed.close()
    lines = (log.folder / "results.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 4
    first, second, third = rows_of(log)
    assert (first["step"], first["lr"], first["AP"], first["box"]) == ("10", "0.123457", "", "")
    assert (second["AP"], second["AP50"]) == ("0.25", "0.5")
    assert third["epoch"] == "3" and third["loss"] == ""


def test_a_column_nobody_knows_is_our_error(log):
    with pytest.raises(ValueError, match="colour"):
        log.epoch({"step": 1, "colour": 3})


def test_mean_losses_are_over_the_steps_since_the_last_call(log):
    log.losses(1, torch.tensor([1.0, 2.0, 3.0]), rate=0.1, epoch="1/2")
    log.losses(2, torch.tensor([3.0, 2.0, 1.0]), rate=0.1, epoch="1/2")
    assert log.take_mean_losses() == {"loss": 6.0, "box": 2.0, "objectness": 2.0, "class": 2.0}
    log.losses(3, torch.tensor([0.0, 0.0, 5.0]), rate=0.1, epoch="2/2")
    assert log.take_mean_losses() == {"loss": 5.0, "box": 0.0, "objectness": 0.0, "class": 5.0}


def test_settings_are_json(log):
    log.settings({"norm": "cbn", "steps": (1, 2), "none": None})
    assert json.loads((log.folder / "settings.json").read_text()) == {"norm": "cbn", "steps": [1, 2], "none": None}


def test_scalars_go_to_tensorboard(log):
    log.losses(1, torch.tensor([1.0, 2.0, 3.0]), rate=0.1, epoch="1/2")
    assert any(path.stat().st_size > 0 for path in (log.folder / "tensorboard").iterdir())
