"""How long a training is: `--patience`, `--time-budget`; and that a resumed one is as long."""

from __future__ import annotations

import csv
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from engine.job import job_of, open_run, parse_job
from engine.step import TrainStep
from engine.time_budget import TimeBudget
from evaluation.evaluator import Evaluator
from tests.e2e import children
from tests.e2e.test_main_job import StopAfter
from tests.e2e.test_ranks import start_two
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.stop import Stopped


def flags(scenes: Path, cfg: str, run: Path, *more: str) -> list[str]:
    """The flags of a training with epochs of 4 steps."""
    common = ["--data", str(scenes), "--cfg", cfg, "--workers", "0", "--device", "cpu", "--lr-policy", "cosine"]
    return [*common, "--out", str(run), *more]


def trained(argv: list[str], stop: StopAfter | None = None) -> None:
    """Train, without the report."""
    job = parse_job(argv)
    train.train(job, open_run(job), stop)


def stopped_and_resumed(argv: list[str], run: Path, *, after: int) -> None:
    with pytest.raises(Stopped):
        trained(argv, StopAfter(steps=after))
    trained(["--resume", str(run), "--workers", "0"])


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation measures the same."""
    monkeypatch.setattr(Evaluator, "measure", lambda *_, **__: SimpleNamespace(AP=0.5, AP50=0.6, words=str))


def test_without_gain_a_training_ends_early_and_well(
    flat: None, scenes: Path, toy_cfg: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trained(flags(scenes, toy_cfg, run, "--epochs", "20", "--evals", "20", "--patience", "2"))
    said = capsys.readouterr().out
    assert "epoch 3: no gain over AP 50.0 in 2 evaluations: the training ends; a larger --patience goes on" in said
    assert Checkpoint.from_file(run / "last.pt").step == Checkpoint.from_file(run / "best.pt").step == 12
    trained(["--resume", str(run), "--workers", "0"])
    assert "warning: no gain over AP 50.0 in 2 evaluations" in capsys.readouterr().out
    assert Checkpoint.from_file(run / "last.pt").step == 12
    trained(["--resume", str(run), "--workers", "0", "--patience", "3"])
    assert Checkpoint.from_file(run / "last.pt").step == 16


@pytest.mark.parametrize("after", [3, 7, 9])
def test_a_resumed_training_has_the_same_patience(
    flat: None, scenes: Path, toy_cfg: str, tmp_path: Path, after: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--epochs", "20", "--evals", "20", "--patience", "2")
    trained(flags(scenes, toy_cfg, whole, *more))
    stopped_and_resumed(flags(scenes, toy_cfg, parts, *more), parts, after=after)
    children.assert_same_training(whole, parts)


def test_a_checkpoint_without_the_state_of_these_goes_on(
    flat: None, scenes: Path, toy_cfg: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained(flags(scenes, toy_cfg, run, "--epochs", "1"))
    last = Checkpoint.from_file(run / "last.pt")
    assert last.training is not None
    for name in ("patience", "time_budget"):
        del last.training.log[name]  # type: ignore[attr-defined]
    last.to_file(run / "last.pt")
    trained(["--resume", str(run), "--workers", "0", "--epochs", "5", "--patience", "1"])
    assert Checkpoint.from_file(run / "last.pt").step == 12


def count_seconds(per_step: float) -> None:
    """Let TimeBudget's clock go on by so much a step, and stand still otherwise."""
    now, call = [0.0], TrainStep.__call__

    def step(self: TrainStep, batch: object) -> object:
        now[0] += per_step
        return call(self, batch)  # type: ignore[arg-type]

    TrainStep.__call__ = step  # type: ignore[assignment, method-assign]
    train.Trainer.__init__.__globals__["TimeBudget"] = partial(TimeBudget, clock=lambda: now[0])


@pytest.fixture
def second_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainStep, "__call__", TrainStep.__call__)  # undone afterwards
    monkeypatch.setattr("engine.trainer.TimeBudget", TimeBudget)
    count_seconds(1.0)


BUDGET = ("--time-budget", "1m", "--evals", "2")
STEPS = 56  # an evaluation is guessed to take a second, half of its 2 batches, and the report takes two of them


def test_a_time_budget_sets_the_length_and_all_that_depends_on_it(
    second_steps: None, scenes: Path, toy_cfg: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trained(flags(scenes, toy_cfg, run, *BUDGET))
    said = capsys.readouterr().out
    assert "schedule  the pace of the first steps decides how many fit into 1m\n" in said
    assert f"schedule  3 steps measured at 1 s: {STEPS} steps and 2 evaluations fit into 1m\n" in said
    assert f"          {STEPS} steps: cosine from 0.006\n" in said
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    assert float(rows[-1]["lr"]) == pytest.approx(1e-5), "the cosine is at its end"
    assert [row["epoch"] for row in rows if row["AP"]] == ["1", "14"]
    assert Checkpoint.from_file(run / "last.pt").step == STEPS
    assert json.loads((run / "settings.json").read_text())["total_steps"] == STEPS


def test_a_resumed_training_has_the_same_budget(second_steps: None, scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(flags(scenes, toy_cfg, whole, *BUDGET))
    stopped_and_resumed(flags(scenes, toy_cfg, parts, *BUDGET), parts, after=30)
    children.assert_same_training(whole, parts)


def test_on_resume_another_length_may_be_typed(second_steps: None, scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(flags(scenes, toy_cfg, run, "--epochs", "2"))
    trained(["--resume", str(run), "--workers", "0", "--time-budget", "40s"])
    assert 40 < Checkpoint.from_file(run / "last.pt").step <= 48, "8 steps were free"
    trained(["--resume", str(run), "--workers", "0", "--time-budget", "44s"])
    assert 44 < Checkpoint.from_file(run / "last.pt").step <= 52
    trained(["--resume", str(run), "--workers", "0", "--epochs", "13"])
    assert Checkpoint.from_file(run / "last.pt").step == 52


def count_seconds_of_its_own() -> None:
    """On rank 1 a step takes three times as long."""
    count_seconds(1.0 + 2 * int(os.environ["RANK"]))


def test_the_clock_of_rank_0_counts_for_all(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    pair = start_two(flags(scenes, toy_cfg, run, *BUDGET), log, before=count_seconds_of_its_own)
    assert [children.ended(child) for child in pair] == [0, 0], log.read_text()[-3000:]
    assert Checkpoint.from_file(run / "last.pt").step == STEPS


@pytest.mark.parametrize(
    "typed", [{"epochs": 3, "time_budget": "1m"}, {"max_steps": 3, "time_budget": "1m"}, {"epochs": 3, "max_steps": 3}]
)
def test_only_one_length_can_be_typed(typed: dict) -> None:
    both = " and ".join("--" + name.replace("_", "-") for name in typed)
    with pytest.raises(UserError, match=f"^{both} both set the length of the training: give one of them$"):
        job_of(typed)
