"""--learning-rate auto: what it finds on curves of a known shape, and that a training is as if it had not been."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import train
from engine import rate_finder
from engine.job import open_run, parse_job
from engine.not_finite import NotFinite
from engine.rate_finder import FEWEST_STEPS, STEPS, choose_rate, smoothed
from engine.step import TrainStep
from engine.trainer import Trainer
from models.network import Network
from tests.e2e import children
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.stop import Stop, Stopped
from utils.structures import Batch

RATES = np.geomspace(rate_finder.LOWEST, rate_finder.HIGHEST, STEPS + 1)


# --- the rule ---------------------------------------------------------------------------------------------------


def curve_with(falls_at: float, rises_at: float, *, depth: float = 3.0, level: float = 100.0) -> np.ndarray:
    """The loss of a network that begins to train at one rate and is destroyed at another."""
    position, falls, rises = (np.log10(x) for x in (RATES, falls_at, rises_at))
    fallen = 1 / (1 + np.exp(-6 * (position - falls)))
    return level * depth**-fallen * np.exp(np.clip(4 * (position - rises), 0, 20))


DECADES = st.floats(-5, -1.5)
WIDTHS = st.floats(1, 3)


@given(DECADES, WIDTHS, st.floats(1.3, 100), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_the_rate_lies_where_the_loss_falls_whatever_the_noise(
    decade: float, width: float, depth: float, place: float, seed: int
) -> None:
    falls_at, rises_at = 10**decade, 10 ** min(decade + width, -0.5)
    noise = np.exp(np.random.default_rng(seed).normal(0, 0.05, len(RATES)))
    chosen = choose_rate(RATES, smoothed(curve_with(falls_at, rises_at, depth=depth) * noise), place=place)
    assert falls_at / 10 < chosen < 3 * rises_at


@given(DECADES, WIDTHS, st.floats(1e-3, 1e6))
def test_the_unit_of_the_loss_does_not_matter(decade: float, width: float, level: float) -> None:
    one, other = (curve_with(10**decade, 10 ** (decade + width), level=x) for x in (1.0, level))
    found = [choose_rate(RATES, smoothed(curve), place=0.5) for curve in (one, other)]
    assert found[0] == found[1]


@pytest.mark.parametrize("steps", [1, 2, 5, 80])
@pytest.mark.parametrize("growth", [0.0, 0.1])
def test_where_no_rate_lowers_the_loss_the_user_types_one(steps: int, growth: float) -> None:
    losses = 100 * np.exp(growth * np.arange(steps))
    with pytest.raises(
        UserError, match=r"^--learning-rate auto: no rate .* lowers the loss; leave it out, or type a number$"
    ):
        choose_rate(RATES[:steps], smoothed(losses), place=0.5)


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=30))
def test_smoothing_keeps_the_number_of_steps_and_the_bounds(losses: list[float]) -> None:
    curve = smoothed(np.array(losses))
    assert curve.shape == (len(losses),)
    assert min(losses) * (1 - 1e-9) <= curve.min() and curve.max() <= max(losses) * (1 + 1e-9)


# --- a training -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine would shorten the test, and find another rate."""
    monkeypatch.setattr(rate_finder, "LIMIT_S", 1e9)


@pytest.fixture
def flags(scenes: Path, toy_cfg: str) -> list[str]:
    common = ["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--device", "cpu", "--evals", "1"]
    return [*common, "--epochs", "2", "--mosaic", "0.5", "--ema-decay", "0.5"]


@pytest.fixture
def steps_tried(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rates of all steps that are made."""
    tried: list[float] = []
    whole = TrainStep.__call__

    def counted(step: TrainStep, batch: Batch) -> Tensor:
        tried.append(step.optimizer.param_groups[0]["lr"])
        return whole(step, batch)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    return tried


def trained(argv: list[str], *, stop: Stop | None = None) -> None:
    job = parse_job(argv)
    train.train(job, open_run(job), stop)


def rate_of(run: Path) -> float | str:
    return Checkpoint.from_file(run / "last.pt").settings["learning_rate"]


@pytest.mark.parametrize(
    ("norm", "optimizer"),
    [
        ("bn", "sgd"),
        ("cmbn:carry,burn_in_steps=0", "adamw"),
        ("cbn:burn_in_steps=1", "sgd"),
        ("mabn", "adamw"),
        ("brn:burn_in_steps=1", "sgd"),
    ],
)
def test_a_training_after_the_test_is_that_with_the_rate_typed(
    flags: list[str], tmp_path: Path, steps_tried: list[float], norm: str, optimizer: str
) -> None:
    auto, typed = tmp_path / "auto", tmp_path / "typed"
    more = ["--norm", norm, "--optimizer", optimizer]
    trained([*flags, *more, "--learning-rate", "auto", "--out", str(auto)])
    assert len(steps_tried) > 20 and max(steps_tried) > 100 * min(filter(None, steps_tried))
    assert (auto / "rate_test.png").exists()
    trained([*flags, *more, "--learning-rate", str(rate_of(auto)), "--out", str(typed)])
    children.assert_same_training(auto, typed)


@pytest.mark.parametrize("norm", ["bn", "cbn:burn_in_steps=1"])
def test_what_the_test_changes_is_put_back(flags: list[str], tmp_path: Path, norm: str) -> None:
    """Weights, statistics, histories that the first step allocates, optimizer, counters, random numbers."""
    job = parse_job([*flags, "--norm", norm, "--optimizer", "adamw", "--learning-rate", "auto", "--out", str(tmp_path)])
    run, untouched = (Trainer(job, tmp_path, Stop()) for _ in range(2))
    rate_finder.find_rate(run)
    assert run.steps_done == 0 and not run.step.optimizer.state
    after, before = (dict(each.network.named_buffers()) | each.network.state_dict() for each in (run, untouched))
    children.same(after, before, norm)
    children.same(run.step.optimizer.state_dict(), untouched.step.optimizer.state_dict(), "optimizer")
    children.same(run.ema.model.state_dict(), untouched.ema.model.state_dict(), "ema")
    draws = []
    for each in (run, untouched):
        if each is untouched:
            Trainer(job, tmp_path, Stop())  # seeds as the first had
        draws.append((torch.rand(3).tolist(), float(np.random.random())))
    assert draws[0] == draws[1]


@pytest.mark.parametrize(("burn_in", "first"), [(5, 5), (8, 0)])
def test_a_norm_is_tested_as_after_its_burn_in_unless_the_training_ends_before(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, burn_in: int, first: int
) -> None:
    """The training has 8 steps."""
    clocks: list[int] = []

    def fail(step: TrainStep, batch: Batch) -> Tensor:
        clocks.append(step.clock.step)
        raise NotFinite

    monkeypatch.setattr(TrainStep, "__call__", fail)
    norm = f"cbn:burn_in_steps={burn_in}"
    with pytest.raises(NotFinite):
        trained([*flags, "--norm", norm, "--learning-rate", "auto", "--out", str(tmp_path / "run")])
    assert clocks == [first] and Checkpoint.from_file(tmp_path / "run" / "last.pt").step == 0


def fail_after(calls: int, error: Exception) -> Callable[[TrainStep, Batch], Tensor]:
    whole, done = TrainStep.__call__, []

    def failing(step: TrainStep, batch: Batch) -> Tensor:
        done.append(1)
        if len(done) == calls:
            raise error
        return whole(step, batch)

    return failing


def test_a_loss_that_is_not_finite_ends_the_curve(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TrainStep, "__call__", fail_after(70, NotFinite("step 70: a weight")))
    monkeypatch.setattr(rate_finder, "_RISEN", float("inf"))
    trained([*flags, "--learning-rate", "auto", "--out", str(tmp_path / "run")])
    assert "(range test of 69 steps, " in capsys.readouterr().out
    assert Checkpoint.from_file(tmp_path / "run" / "last.pt").step == 8


def test_data_that_is_not_finite_ends_the_run(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(TrainStep, "__call__", fail_after(1, NotFinite("step 1: a pixel of x.jpg is not finite")))
    with pytest.raises(NotFinite, match="a pixel of x"):
        trained([*flags, "--learning-rate", "auto", "--out", str(tmp_path / "run")])


def test_memory_that_runs_out_in_the_test_changes_nothing(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of 4 images fit, in the test as in the training."""
    auto, typed, forward = tmp_path / "auto", tmp_path / "typed", Network.forward

    def limited(network: Network, images: Tensor) -> object:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, images)

    monkeypatch.setattr(Network, "forward", limited)
    more = ["--norm", "cmbn", "--subdivisions", "1"]
    trained([*flags, *more, "--learning-rate", "auto", "--out", str(auto)])
    trained([*flags, *more, "--learning-rate", str(rate_of(auto)), "--out", str(typed)])
    children.assert_same_training(auto, typed)


def test_a_stop_in_the_test_loses_nothing_and_resume_tests_again(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start = [*flags, "--norm", "cbn:burn_in_steps=1", "--learning-rate", "auto"]
    trained([*start, "--out", str(whole)])
    stop, step = Stop(), TrainStep.__call__

    def stopping(one: TrainStep, batch: Batch) -> Tensor:
        stop.requested = one.clock.step == 40
        return step(one, batch)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(TrainStep, "__call__", stopping)
        trained([*start, "--out", str(parts)], stop=stop)
    last = Checkpoint.from_file(parts / "last.pt")
    assert stopped.value.is_saved and last.step == 0 and last.settings["learning_rate"] == "auto"
    trained(["--resume", str(parts), "--workers", "0"])
    children.assert_same_training(whole, parts)


def test_a_resumed_training_does_not_test_again(flags: list[str], tmp_path: Path, steps_tried: list[float]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained([*flags, "--learning-rate", "auto", "--lr-policy", "constant", "--out", str(whole)])
    trained([*flags, "--epochs", "1", "--learning-rate", "auto", "--lr-policy", "constant", "--out", str(parts)])
    steps_tried.clear()
    trained(["--resume", str(parts), "--epochs", "2", "--workers", "0"])
    assert len(steps_tried) == 4 and set(steps_tried) == {rate_of(parts)} == {rate_of(whole)}
    with pytest.raises(UserError, match=r"--learning-rate auto is found before the first step"):
        trained(["--resume", str(parts), "--epochs", "3", "--learning-rate", "auto"])


def test_slow_steps_make_a_shorter_test(
    flags: list[str], tmp_path: Path, steps_tried: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is read once a step, and says that steps take an hour."""
    monkeypatch.setattr(rate_finder, "LIMIT_S", 60)
    monkeypatch.setattr(rate_finder, "_RISEN", float("inf"))
    monkeypatch.setattr(rate_finder, "choose_rate", lambda *_, **__: 0.01)
    monkeypatch.setattr(time, "monotonic", lambda: 3600.0 * len(steps_tried))
    job = parse_job([*flags, "--learning-rate", "auto", "--out", str(tmp_path)])
    rate_finder.find_rate(Trainer(job, tmp_path, Stop()))
    assert FEWEST_STEPS <= len(steps_tried) <= FEWEST_STEPS + 5


@pytest.mark.parametrize("text", ["fast", "", "0", "-1", "nan", "1e999"])
def test_what_is_neither_a_rate_nor_auto_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_job(["--learning-rate", text])
    assert "--learning-rate" in capsys.readouterr().err


def test_a_job_that_torchrun_starts_again_goes_on_with_what_was_found(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = [*flags, "--learning-rate", "auto", "--out", str(tmp_path / "run")]
    trained(start)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("engine.resuming.folder_of_job", lambda job, name: Path(name))
    assert parse_job(start).options.optim.learning_rate == rate_of(tmp_path / "run")
