"""What a training tells its listeners, and what they write."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.events import Listener, Record, Run
from engine.result_files import COLUMNS
from engine.run_length import RunLength
from engine.training_log import TrainingLog
from evaluation.coco_map import CocoTable

LENGTH = RunLength(total_steps=40, epoch_steps=2, evals=4)


class Witness(Listener):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, object]] = []

    def start(self, run: Run) -> None:
        self.heard.append(("start", run))

    def step(self, record: Record) -> None:
        self.heard.append(("step", record))

    def epoch(self, record: Record) -> None:
        self.heard.append(("epoch", record))

    def evaluation(self, record: Record) -> None:
        self.heard.append(("evaluation", record))

    def end(self) -> None:
        self.heard.append(("end", None))

    def error(self, error: BaseException) -> None:
        self.heard.append(("error", error))


def opened(folder: Path, *listeners: Listener, step: int = 0, epochs_done: int = 0, loggers=("none",)) -> TrainingLog:
    log = TrainingLog(folder, nn.Sequential(), length=LENGTH, step=step, evaluation_batches=1)
    run = Run(folder=folder, run_id="a", settings={"norm": "bn"}, step=step, epochs_done=epochs_done)
    log.begin(run, loggers=loggers, listeners=listeners)
    return log


@pytest.fixture
def log(tmp_path: Path) -> TrainingLog:
    return opened(tmp_path)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def table(ap: float) -> CocoTable:
    return CocoTable(stats={"AP": ap, "AP50": 2 * ap}, classes=(), precision=torch.zeros(101, 0).numpy())


def train_epoch(log: TrainingLog, epoch: int, ap: float | None = None) -> None:
    for step in (2 * epoch + 1, 2 * epoch + 2):
        log.losses(step, torch.tensor([1.0, 2.0, 3.0]), lr=0.1234567891, epoch=epoch)
    log.end_epoch(epoch, lr=0.1234567891, table=None if ap is None else table(ap))


def test_events_come_in_their_order_and_have_what_is_known(tmp_path: Path) -> None:
    witness = Witness()
    log = opened(tmp_path, witness)
    train_epoch(log, 0)
    log.image("predictions", torch.zeros(2, 2, 3, dtype=torch.uint8).numpy())
    train_epoch(log, 1, ap=0.25)
    log.end()
    names = [name for name, _ in witness.heard]
    assert names == ["start", "step", "step", "epoch", "step", "step", "evaluation", "epoch", "end"]
    first, evaluation, epoch = (witness.heard[place][1] for place in (1, 6, 7))
    assert (first.step, first.epoch, first.scalars["train/loss"]) == (1, 1, 6.0)
    assert (evaluation.step, evaluation.epoch) == (4, 2) and evaluation.scalars == {"val/AP": 0.25, "val/AP50": 0.5}
    assert epoch.scalars.keys() <= set(COLUMNS) and epoch.scalars["AP"] == 0.25
    assert (tmp_path / "predictions.png").exists()
    assert [name for name, what in witness.heard if getattr(what, "images", None)] == ["step"], "told once"


def test_a_failure_is_told_in_place_of_the_end(tmp_path: Path) -> None:
    witness = Witness()
    log = opened(tmp_path, witness)
    log.end(error := ValueError("a"))
    assert witness.heard[1:] == [("error", error)]


@pytest.mark.parametrize("event", ["start", "step", "epoch", "evaluation", "end"])
def test_a_listener_that_fails_is_named_once_and_the_others_go_on(tmp_path: Path, capsys, event: str) -> None:
    failing, witness = Witness(), Witness()
    setattr(failing, event, lambda *_: 1 / 0)
    log = opened(tmp_path, failing, witness)
    train_epoch(log, 0, ap=0.5)
    train_epoch(log, 1, ap=0.5)
    log.end()
    assert capsys.readouterr().out.count("warning: Witness has failed and is told no more of this training") == 1
    assert len(witness.heard) == 10


def test_results_have_their_header_once_and_absent_columns_stay_empty(log, tmp_path: Path) -> None:
    train_epoch(log, 0)
    train_epoch(log, 1, ap=0.25)
    train_epoch(opened(tmp_path, step=4, epochs_done=2), 2)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 4
    first, second, third = rows_of(tmp_path)
    assert (first["step"], first["lr"], first["AP"]) == ("2", "0.123457", "")
    assert (second["AP"], second["AP50"]) == ("0.25", "0.5")
    assert third["epoch"] == "3"


def test_rows_of_epochs_that_are_trained_again_are_dropped(log, tmp_path: Path) -> None:
    for epoch in range(3):
        train_epoch(log, epoch)
    opened(tmp_path, step=2, epochs_done=1)
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1"]


def losses_in(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[name]) for name in ("loss", "box", "objectness", "class")}


def test_losses_of_an_epoch_are_means_over_its_steps_also_after_an_interruption(log, tmp_path: Path) -> None:
    log.losses(1, torch.tensor([1.0, 2.0, 3.0]), lr=0.1, epoch=0)
    resumed = opened(tmp_path, step=1)
    resumed.load_state_dict(log.state_dict())
    resumed.losses(2, torch.tensor([3.0, 2.0, 1.0]), lr=0.1, epoch=0)
    resumed.end_epoch(0, lr=0.1, table=None)
    resumed.losses(3, torch.tensor([0.0, 0.0, 5.0]), lr=0.1, epoch=1)
    resumed.end_epoch(1, lr=0.1, table=None)
    first, second = rows_of(tmp_path)
    assert losses_in(first) == {"loss": 6.0, "box": 2.0, "objectness": 2.0, "class": 2.0}
    assert losses_in(second) == {"loss": 5.0, "box": 0.0, "objectness": 0.0, "class": 5.0}


def test_time_before_an_interruption_counts_to_its_own_epoch_and_to_no_other(log, tmp_path: Path) -> None:
    for _ in log.watch([[0], [0]], 0):
        time.sleep(0.02)
    assert log.state_dict()["seconds"] >= 0.04
    log.end_epoch(0, lr=0.1, table=None)
    assert log.state_dict()["seconds"] == 0
    resumed = opened(tmp_path, step=2, epochs_done=1)
    resumed.load_state_dict({**log.state_dict(), "seconds": 100.0})
    resumed.end_epoch(1, lr=0.1, table=None)
    first, second = (float(row["seconds"]) for row in rows_of(tmp_path))
    assert 0.04 <= first < 100 <= second


def test_the_speed_and_the_time_left_are_printed_once_after_a_few_batches(log, capsys) -> None:
    for epoch in range(4):  # epochs so short that none alone shows it
        for _ in log.watch([[0, 0]] * 3, epoch):
            time.sleep(0.001)
    said = capsys.readouterr().out
    assert said.count("images/s") == 1 and "the end in about" in said
