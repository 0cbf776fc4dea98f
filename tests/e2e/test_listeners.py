"""What a whole training tells, and that nobody who listens changes a bit of it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import train
from engine.events import Listener, Record
from engine.job import parse_job
from tests.engine.test_training_log import Witness
from utils.checkpoint import Checkpoint
from utils.stop import Stop, Stopped


def flags(scenes: Path, toy_cfg: str, norm: str = "cmbn", logger: str = "none") -> list[str]:
    page = ["--data", str(scenes), "--cfg", toy_cfg, "--norm", norm, "--epochs", "3", "--evals", "3", "--workers", "0"]
    return [*page, "--batch-size", "4", "--subdivisions", "2", "--device", "cpu", "--logger", logger]


def health_in(folder: Path) -> list[dict[str, str]]:
    with open(folder / "norm_health.csv", newline="") as file:
        return list(csv.DictReader(file))


class Stopping(Listener):
    """Stops the training after a step."""

    def __init__(self, stop: Stop, step: int) -> None:
        self.stop, self.last = stop, step

    def step(self, record: Record) -> None:
        self.stop.requested |= record.step == self.last


def test_a_training_with_listeners_and_a_stop_ends_as_one_without(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train.train(parse_job(flags(scenes, toy_cfg)), whole)
    steps = Checkpoint.from_file(whole / "last.pt").step
    stop, witness = Stop(), Witness()
    with pytest.raises(Stopped):
        listeners = [witness, Stopping(stop, steps // 2)]
        train.train(parse_job(flags(scenes, toy_cfg, logger="tensorboard")), parted, stop, listeners)
    assert witness.heard[-1][0] == "end"
    resumed = Witness()
    train.train(parse_job(["--resume", str(parted)]), parted, listeners=[resumed])
    a, b = (Checkpoint.from_file(folder / "last.pt").weights for folder in (whole, parted))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r.step for name, r in (*witness.heard, *resumed.heard) if name == "step"] == [*range(1, steps + 1)]
    assert witness.heard[0][1].run_id == resumed.heard[0][1].run_id and resumed.heard[0][1].step == steps // 2
    assert health_in(whole) == health_in(parted)


def test_the_health_of_the_norms_is_written_at_each_evaluation(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    witness = Witness()
    train.train(parse_job(flags(scenes, toy_cfg)), tmp_path / "run", listeners=[witness])
    evaluations = [record for name, record in witness.heard if name == "evaluation"]
    rows = health_in(tmp_path / "run")
    layers = len(rows) // 3
    assert [int(row["epoch"]) for row in rows] == [1] * layers + [2] * layers + [3] * layers
    for record in evaluations:
        assert len(record.norms) == layers and 0 < record.scalars["norm/pooled_worst"] < float("inf")


def test_norms_without_running_statistics_have_no_health(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    train.train(parse_job(flags(scenes, toy_cfg, norm="gn:groups=1")), tmp_path / "run")
    assert (tmp_path / "run" / "results.png").exists() and not (tmp_path / "run" / "norm_health.csv").exists()
