"""Nothing that happens to a training may cost more than time: kills, signals, a full disk."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from models.network import Network
from tests.e2e import children
from utils.checkpoint import read_checkpoint
from utils.errors import UserError

NORMS = ("bn", "cmbn", "cbn")


def flags(scenes: Path, cfg: str, norm: str, run: Path, *more: str) -> list[str]:
    common = ["--data", str(scenes), "--cfg", cfg, "--norm", norm, "--epochs", "3", "--evals", "2", "--workers", "1"]
    common += ["--device", "cpu"]
    common += ["--norm-burn-in-steps", "2"] if norm == "cbn" else []
    return [*common, "--save-minutes", "0", "--mosaic", "0.5", "--run", str(run), *more]


def kill_until_done(start: list[str], run: Path, log: Path, *, kills: int, rng: random.Random, typical_s: float) -> int:
    """How often it was killed. After each kill, last.pt is readable or not there yet."""
    killed = 0
    while True:
        resumable = (run / "last.pt").exists()
        if not resumable and run.exists():
            for left in run.rglob("*"):
                left.unlink() if left.is_file() else None
            for left in sorted(run.rglob("*"), reverse=True):
                left.rmdir()
        again = ["--resume", str(run), "--workers", "1", "--save-minutes", "0"]
        child = children.start(again if resumable else start, log=log)
        if killed == kills:
            assert children.ended(child) == 0, log.read_text()[-3000:]
            return killed
        if not children.killed_after(child, rng.uniform(0, typical_s)):
            return killed
        killed += 1
        if (run / "last.pt").exists():
            assert "training" in read_checkpoint(run / "last.pt")


@pytest.mark.parametrize("norm", NORMS)
def test_a_killed_training_ends_like_one_that_was_not(scenes: Path, toy_cfg: str, tmp_path: Path, norm: str) -> None:
    begun = time.monotonic()
    assert children.ended(children.start(flags(scenes, toy_cfg, norm, tmp_path / "whole"), log=tmp_path / "log")) == 0
    took_s = time.monotonic() - begun
    start = flags(scenes, toy_cfg, norm, tmp_path / "parts")
    rng = random.Random(norm)
    killed = kill_until_done(start, tmp_path / "parts", tmp_path / "log", kills=3, rng=rng, typical_s=took_s)
    assert killed > 0
    children.assert_same_training(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_twenty_kills_change_nothing(scenes: Path, toy_cfg: str, tmp_path: Path, norm: str) -> None:
    more = ("--epochs", "20")
    begun = time.monotonic()
    whole = flags(scenes, toy_cfg, norm, tmp_path / "whole", *more)
    assert children.ended(children.start(whole, log=tmp_path / "log")) == 0
    took_s = time.monotonic() - begun
    rng, killed, round_ = random.Random(norm), 0, 0
    while killed < 20:
        run = tmp_path / f"parts{round_}"
        start = flags(scenes, toy_cfg, norm, run, *more)
        killed += kill_until_done(start, run, tmp_path / "log", kills=20 - killed, rng=rng, typical_s=took_s / 3)
        children.assert_same_training(tmp_path / "whole", run)
        round_ += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_nothing_is_lost(
    scenes: Path, toy_cfg: str, tmp_path: Path, number: int
) -> None:
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    train.main(flags(scenes, toy_cfg, "cmbn", whole))
    child = children.start(flags(scenes, toy_cfg, "cmbn", parts), log=log)
    children.wait_for_step(parts, 2)
    os.killpg(child.pid, number)  # as a terminal does: the loader's workers hear it, too
    assert children.ended(child) == 0, log.read_text()[-3000:]
    assert f"go on with: python train.py --resume {parts}" in log.read_text()
    assert "Traceback" not in log.read_text()
    train.main(["--resume", str(parts), "--workers", "1", "--save-minutes", "0"])
    children.assert_same_training(whole, parts)


def hang() -> None:
    """A step that takes an hour."""
    train.Training.keep_last = lambda *_: time.sleep(3600)  # type: ignore[method-assign]


def test_the_second_signal_ends_it_at_once(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    child = children.start(flags(scenes, toy_cfg, "bn", tmp_path / "run"), log=tmp_path / "log", before=hang)
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "settings.json").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGINT)
    assert children.ended(child) == 128 + signal.SIGINT


def fill_disk_after_the_first_checkpoint(run: Path) -> None:
    """No file may grow beyond 2 kB for five checkpoints after it: real writes that fail half-way."""
    keep, calls = train.Training.keep_last, []

    def keep_last(training: train.Training) -> None:
        calls.append(1)
        full = 2 < len(calls) < 8
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        keep(training)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        left = read_checkpoint(run / "last.pt")
        assert left["step"] == (training.steps_done if not full else 1), left["step"]

    train.Training.keep_last = keep_last  # type: ignore[method-assign]


def test_a_full_disk_costs_checkpoints_but_not_the_training(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    train.main(flags(scenes, toy_cfg, "cmbn", whole))

    fill_disk = partial(fill_disk_after_the_first_checkpoint, run)
    child = children.start(flags(scenes, toy_cfg, "cmbn", run), log=log, before=fill_disk)
    assert children.ended(child) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert said.count(f"error: {run / 'last.pt'} was not written (File too large)") == 5
    assert not list(run.glob("*.part"))
    children.assert_same_training(whole, run)


def test_memory_that_ran_out_in_training_and_in_evaluation_costs_only_time(
    scenes: Path, toy_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 4 pictures 2 fit; the run goes on, evaluates, and after --resume still knows."""
    forward = Network.forward

    def limited(network: Network, images: torch.Tensor) -> object:
        if len(images) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return forward(network, images)

    monkeypatch.setattr(Network, "forward", limited)
    common = flags(scenes, toy_cfg, "gn", tmp_path / "run", "--subdivisions", "1", "--workers", "0")
    train.main([*common, "--epochs", "1"])
    assert "going on with --subdivisions 2, 2 pictures each" in capsys.readouterr().out
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "2", "--workers", "0"])
    assert "out of memory" not in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "run" / "last.pt")["subdivisions"] == 2
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "3", "--workers", "0", "--subdivisions", "4"])
    assert read_checkpoint(tmp_path / "run" / "last.pt")["subdivisions"] == 4


def fill_disk_at_the_end() -> None:
    finish = train.finish

    def on_a_full_disk(*given: object) -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        table = finish(*given)  # type: ignore[arg-type]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return table

    train.finish = on_a_full_disk  # type: ignore[assignment]


def test_a_disk_that_is_full_at_the_end_leaves_the_table(
    scenes: Path, toy_cfg: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"

    # Without workers, whose shared memory is files, too.
    child = children.start(flags(scenes, toy_cfg, "bn", run, "--workers", "0"), log=log, before=fill_disk_at_the_end)
    assert children.ended(child) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert f"error: {run / 'best.safetensors'} was not written (File too large)" in said
    assert "Average Precision" in said and read_checkpoint(run / "best.pt")["step"] > 0


def test_resume_alone_goes_on_with_the_newest_run(scenes: Path, toy_cfg: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run to go on with"):
        train.main(["--resume"])
    for epochs in ("1", "2"):
        train.main(["--data", str(scenes), "--cfg", toy_cfg, "--epochs", epochs, "--workers", "0"])
    newest = tmp_path / "runs" / "scenes-toy-bn-2"
    assert read_checkpoint(newest / "last.pt")["step"] == 8
    train.main(["--resume", "--epochs", "3", "--workers", "0"])
    assert read_checkpoint(newest / "last.pt")["step"] == 12


def test_a_training_of_an_earlier_format_is_refused(scenes: Path, toy_cfg: str, tmp_path: Path, monkeypatch) -> None:
    train.main(
        ["--data", str(scenes), "--cfg", toy_cfg, "--epochs", "1", "--workers", "0", "--run", str(tmp_path / "a")]
    )
    monkeypatch.setattr("preparation.RESUMABLE_FROM", 1000)
    with pytest.raises(UserError, match=r"earlier version .* start a new run from its weights"):
        train.main(["--resume", str(tmp_path / "a")])
