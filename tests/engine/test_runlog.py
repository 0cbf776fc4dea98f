"""The folder of a run, and what is written there."""

from __future__ import annotations

import csv
import json
import tempfile
import time
from pathlib import Path

import pytest
import torch

from engine.results_csv import COLUMNS
from engine.runlog import RunLog
from tests.toy_checkpoint import toy_checkpoint
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.run_folder import free_folder, writable_folder


def test_the_default_folder_gets_a_number_when_taken(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = free_folder(None, default="digits-pico-bn")
        assert folder.is_dir()
        names.append(str(folder))
    assert names == [str(Path("runs") / f"digits-pico-bn{suffix}") for suffix in ("", "-2", "-3")]


def test_runs_that_begin_at_the_same_moment_have_a_folder_each(tmp_path: Path, monkeypatch):
    """When they look, neither has made its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda *_, **__: False)
    folders = [free_folder(None, default="digits-pico-bn") for _ in range(3)]
    assert len(set(folders)) == len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.parametrize("place", ["runs", "elsewhere"])
def test_where_nothing_can_be_made_it_is_said(tmp_path: Path, monkeypatch, place: str):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    Path("elsewhere").symlink_to("gone")
    with pytest.raises(UserError, match=f"^{place}: cannot be created, File exists$"):
        free_folder(None, default="x") if place == "runs" else writable_folder(Path(place))


def test_a_folder_that_cannot_be_written_to_is_the_users_error(tmp_path: Path, monkeypatch):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be written to, Permission denied$"):
        writable_folder(tmp_path)


def test_a_typed_folder_is_taken_as_it_is_when_free(tmp_path: Path):
    assert free_folder(str(tmp_path / "new"), default="x") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert free_folder(str(tmp_path / "empty"), default="x") == tmp_path / "empty"


def test_a_typed_folder_that_holds_something_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=f"^{taken}: already exists"):
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
    log.end_epoch({"step": 10, "epoch": 1, "lr": 0.1234567891})
    log.end_epoch({"step": 20, "epoch": 2, "lr": 0.1, "AP": 0.25, "AP50": 0.5})
    resumed = RunLog(log.folder, total_steps=4, first_step=2, epochs_done=2)
    resumed.end_epoch({"step": 30, "epoch": 3})
    resumed.close()
    lines = (log.folder / "results.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 4
    first, second, third = rows_of(log)
    assert (first["step"], first["lr"], first["AP"]) == ("10", "0.123457", "")
    assert (second["AP"], second["AP50"]) == ("0.25", "0.5")
    assert third["epoch"] == "3" and third["lr"] == ""


def test_rows_of_epochs_that_are_trained_again_are_dropped(log):
    for epoch in (1, 2, 3):
        log.end_epoch({"step": epoch, "epoch": epoch})
    RunLog(log.folder, total_steps=4, first_step=1, epochs_done=1).close()
    assert [row["epoch"] for row in rows_of(log)] == ["1"]


def test_a_column_nobody_knows_is_our_error(log):
    with pytest.raises(ValueError, match="colour"):
        log.end_epoch({"step": 1, "colour": 3})


def losses_in(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[name]) for name in ("loss", "box", "objectness", "class")}


def test_losses_of_an_epoch_are_means_over_its_steps(log):
    log.losses(1, torch.tensor([1.0, 2.0, 3.0]), lr=0.1, epoch="1/2")
    log.losses(2, torch.tensor([3.0, 2.0, 1.0]), lr=0.1, epoch="1/2")
    log.end_epoch({"step": 2, "epoch": 1})
    log.losses(3, torch.tensor([0.0, 0.0, 5.0]), lr=0.1, epoch="2/2")
    log.end_epoch({"step": 3, "epoch": 2})
    first, second = rows_of(log)
    assert losses_in(first) == {"loss": 6.0, "box": 2.0, "objectness": 2.0, "class": 2.0}
    assert losses_in(second) == {"loss": 5.0, "box": 0.0, "objectness": 0.0, "class": 5.0}


def test_an_epoch_that_was_interrupted_has_the_losses_of_all_its_steps(log):
    log.losses(1, torch.tensor([1.0, 2.0, 3.0]), lr=0.1, epoch="1/2")
    resumed = RunLog(log.folder, total_steps=4, first_step=1)
    resumed.load_state_dict(log.state_dict())
    resumed.losses(2, torch.tensor([3.0, 2.0, 1.0]), lr=0.1, epoch="1/2")
    resumed.end_epoch({"step": 2, "epoch": 1})
    resumed.close()
    assert losses_in(rows_of(log)[0]) == {"loss": 6.0, "box": 2.0, "objectness": 2.0, "class": 2.0}


def test_time_before_an_interruption_counts_to_its_own_epoch_and_to_no_other(log):
    def train_two_batches() -> None:
        for _ in log.watch([[0], [0]]):
            time.sleep(0.02)

    train_two_batches()
    assert log.state_dict()["seconds"] >= 0.04
    log.end_epoch({"step": 2, "epoch": 1})
    assert log.state_dict()["seconds"] == 0
    resumed = RunLog(log.folder, total_steps=4, first_step=2, epochs_done=1)
    resumed.load_state_dict({**log.state_dict(), "seconds": 100.0})
    resumed.end_epoch({"step": 4, "epoch": 2})
    resumed.close()
    first, second = (float(row["seconds"]) for row in rows_of(log))
    assert 0.04 <= first < 100 <= second


def test_a_checkpoint_that_cannot_be_written_is_a_line(log, monkeypatch, capsys):
    assert log.save("last.pt", toy_checkpoint(step=1))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert not log.save("last.pt", toy_checkpoint(step=2))
    assert f"error: {log.folder / 'last.pt'} was not written (No space left on device)" in capsys.readouterr().err
    assert Checkpoint.from_file(log.folder / "last.pt").step == 1


def test_a_run_that_can_save_nothing_ends_after_five_tries(log, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for _ in range(4):
            assert not log.save("last.pt", toy_checkpoint())
        assert capsys.readouterr().err.count("nothing that is trained here can be saved") == 1
        with pytest.raises(UserError, match=f"^{log.folder}: nothing that is trained here can be saved, in 5 tries"):
            log.save("best.pt", toy_checkpoint())


def test_time_makes_a_save_due_and_so_does_the_end_of_an_epoch_that_took_longer_than_saving(
    tmp_path: Path, monkeypatch
):
    always, seldom = (RunLog(tmp_path / "run", total_steps=4, save_every_s=s) for s in (0, 3600))
    assert always.is_save_due() and not seldom.is_save_due()
    assert seldom.is_save_due(at_epoch_end=True)
    monkeypatch.setattr(Checkpoint, "to_file", lambda *_: time.sleep(0.2))
    seldom.save("last.pt", toy_checkpoint())
    assert not seldom.is_save_due(at_epoch_end=True)
    for each in (always, seldom):
        each.close()


def test_the_speed_is_printed_once_after_a_few_batches(log, capsys):
    for _ in range(4):  # epochs so short that none alone shows it
        for _ in log.watch([[0, 0]] * 3):
            time.sleep(0.001)
    assert capsys.readouterr().out.count("images/s") == 1


def test_settings_are_json(log):
    log.settings({"norm": "cbn", "steps": (1, 2), "none": None})
    assert json.loads((log.folder / "settings.json").read_text()) == {"norm": "cbn", "steps": [1, 2], "none": None}


def test_scalars_go_to_tensorboard(log):
    log.losses(1, torch.tensor([1.0, 2.0, 3.0]), lr=0.1, epoch="1/2")
    assert any(path.stat().st_size > 0 for path in (log.folder / "tensorboard").iterdir())
