"""Two processes under `torchrun` train as one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import evaluate
import train
from engine.step import TrainStep
from evaluation import inference
from models.network import Network
from tests.e2e import children
from utils import ranks
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.structures import Batch


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_two(
    flags: list[str], log: Path, *, before: Callable[[], None] | None = None, **more: str
) -> list[BaseProcess]:
    """Both ranks, as torchrun starts them. before: what each does first."""
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **more}
    settings = [both | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [children.start(flags, log=log, before=partial(join, each, before)) for each in settings]


def join(environment: dict[str, str], before: Callable[[], None] | None) -> None:
    os.environ |= environment
    if before is not None:
        before()


def flags(scenes: Path, cfg: str, run: Path, *more: str) -> list[str]:
    common = ["--data", str(scenes), "--cfg", cfg, "--workers", "0", "--epochs", "2", "--evals", "2"]
    common += ["--device", "cpu"]
    return [*common, "--ema-decay", "0.5", "--out", str(run), *more]


def differences(one: Path, other: Path) -> dict[str, float]:
    """Largest of each tensor of the network and of the averaged weights."""
    a, b = (Checkpoint.from_file(run / "last.pt") for run in (one, other))
    assert a.step == b.step > 0
    pairs = [(a.weights, b.weights), (a.training.state["network"], b.training.state["network"])]
    return {name: (s[name] - t[name]).abs().max().item() for s, t in pairs for name in s}


@pytest.mark.parametrize(("norm", "subdivisions"), [("gn", "1"), ("gn", "2"), ("syncbn", "1")])
def test_two_ranks_are_one_with_the_same_batch(
    scenes: Path, toy_cfg: str, tmp_path: Path, norm: str, subdivisions: str
) -> None:
    """With synchronized statistics and several mini-batches, other images would meet in each than in one process."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    cut = ("--norm", norm, "--batch-size", "4", "--subdivisions", subdivisions)
    train.main(flags(scenes, toy_cfg, alone, *cut))
    pair = start_two(flags(scenes, toy_cfg, together, *cut), tmp_path / "log")
    assert [children.ended(child) for child in pair] == [0, 0], (tmp_path / "log").read_text()[-3000:]
    found = differences(alone, together)
    assert max(found.values()) < 1e-6, {name: value for name, value in found.items() if value >= 1e-6}
    losses = [
        [row.split(",")[3:7] for row in (run / "results.csv").read_text().splitlines()[1:]] for run in (alone, together)
    ]
    for ours, theirs in zip(*losses, strict=True):
        assert [float(x) for x in ours] == pytest.approx([float(x) for x in theirs], rel=1e-5)


def test_what_two_ranks_measure_is_what_one_measures(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pair = start_two(flags(scenes, toy_cfg, run, "--norm", "cmbn"), tmp_path / "log")
    assert [children.ended(child) for child in pair] == [0, 0], (tmp_path / "log").read_text()[-3000:]
    said = (tmp_path / "log").read_text()
    assert said.count("batch 4 = 2 processes x ") == 1  # rank 0 prints
    assert said.count("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all") == 1
    report = ["--weights", str(run / "best.pt"), "--data", str(scenes), "--batch-size", "2", "--workers", "0"]
    evaluate.main([*report, "--out", str(tmp_path / "report")])
    for name in ("detections.json", "metrics.json"):
        assert json.loads((tmp_path / "report" / name).read_text()) == json.loads((run / name).read_text())


@pytest.mark.parametrize("shuffled", [(), ("--shuffle-bn",)])
def test_histories_of_both_ranks_are_saved_and_the_job_goes_on_to_the_bit(
    scenes: Path, toy_cfg: str, tmp_path: Path, shuffled: tuple[str, ...]
) -> None:
    """Stopped by a signal to one of them, as a job manager may do."""
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    common = ("--norm", "cbn:burn_in_steps=1", "--save-minutes", "0", *shuffled)
    for child in start_two(flags(scenes, toy_cfg, whole, *common), log):
        assert children.ended(child) == 0, log.read_text()[-3000:]
    pair = start_two(flags(scenes, toy_cfg, parts, *common), log)
    children.wait_for_step(parts, 2)
    os.kill(pair[1].pid, signal.SIGTERM)
    assert [children.ended(child) for child in pair] == [0, 0], log.read_text()[-3000:]
    halfway = Checkpoint.from_file(parts / "last.pt").training.state["ranks"]
    assert len(halfway) == 2
    rings = [state["norm_histories"]["layers.1.norm.ring_mean"] for state in halfway]
    assert not torch.equal(*rings)
    for child in start_two(["--resume", str(parts), "--workers", "0"], log):
        assert children.ended(child) == 0, log.read_text()[-3000:]
    children.assert_same_training(whole, parts)


def test_shuffled_images_make_other_weights_and_recomputing_activations_makes_the_same(
    scenes: Path, toy_cfg: str, tmp_path: Path
) -> None:
    log, shuffled, again = tmp_path / "log", ("--shuffle-bn",), ("--shuffle-bn", "--checkpoint-activations")
    for name, more in (("plain", ()), ("shuffled", shuffled), ("again", again)):
        cut = ("--norm", "cmbn", "--batch-size", "8", "--subdivisions", "2", *more)
        for child in start_two(flags(scenes, toy_cfg, tmp_path / name, *cut), log):
            assert children.ended(child) == 0, log.read_text()[-3000:]
    assert max(differences(tmp_path / "plain", tmp_path / "shuffled").values()) > 1e-3
    assert max(differences(tmp_path / "shuffled", tmp_path / "again").values()) == 0


def test_two_ranks_find_one_learning_rate_and_train_as_if_it_had_been_typed(
    scenes: Path, toy_cfg: str, tmp_path: Path
) -> None:
    """Each has statistics and histories of its own to put back."""
    auto, typed, log = tmp_path / "auto", tmp_path / "typed", tmp_path / "log"
    rate = "auto"
    for run in (auto, typed):
        for child in start_two(
            flags(scenes, toy_cfg, run, "--norm", "cbn:burn_in_steps=1", "--learning-rate", rate), log
        ):
            assert children.ended(child) == 0, log.read_text()[-3000:]
        rate = str(Checkpoint.from_file(run / "last.pt").settings["learning_rate"])
    assert log.read_text().count("(range test of ") == 1  # rank 0 prints
    children.assert_same_training(auto, typed)


def be_slow_to_evaluate() -> None:
    detect = inference._detect_in_parts
    inference._detect_in_parts = lambda *given: (time.sleep(1), detect(*given))[1]  # type: ignore[assignment]


def test_a_signal_in_a_long_evaluation_is_heeded_and_nothing_is_lost(
    scenes: Path, toy_cfg: str, tmp_path: Path
) -> None:
    """As when a job manager ends a job: to both ranks, and it would not wait."""
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    for child in start_two(flags(scenes, toy_cfg, whole), log):
        assert children.ended(child) == 0, log.read_text()[-3000:]

    pair = start_two(flags(scenes, toy_cfg, parts), log, before=be_slow_to_evaluate)
    children.wait_for_step(parts, 4)  # the first epoch's last: it is being evaluated now
    time.sleep(0.3)
    for child in pair:
        os.kill(child.pid, signal.SIGTERM)
    assert [children.ended(child) for child in pair] == [0, 0], log.read_text()[-3000:]
    assert f"nothing is lost; resume with: python train.py --resume {parts}" in log.read_text()
    assert Checkpoint.from_file(parts / "last.pt").epochs_done == 0
    for child in start_two(["--resume", str(parts), "--workers", "0"], log):
        assert children.ended(child) == 0, log.read_text()[-3000:]
    children.assert_same_training(whole, parts)


def test_a_job_that_torchrun_starts_again_goes_on(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    """The same command with the count of restarts in the environment."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = flags(scenes, toy_cfg, run, "--save-minutes", "0")
    pair = start_two(command, log)
    children.wait_for_step(run, 2)
    for child in pair:
        child.kill()
        children.ended(child)
    assert Checkpoint.from_file(run / "last.pt").step < 8
    pair = start_two(command, log, TORCHELASTIC_RESTART_COUNT="1")
    assert [children.ended(child) for child in pair] == [0, 0], log.read_text()[-3000:]
    assert Checkpoint.from_file(run / "last.pt").step == 8


def test_a_job_that_died_before_its_first_checkpoint_begins_anew_and_leaves_other_runs_alone(
    scenes: Path, toy_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = ["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--device", "cpu", "--epochs", "1"]
    plain += ["--norm", "bn"]
    train.main(plain)  # somebody's, finished, and the newest
    other = tmp_path / "runs" / "scenes-toy-bn"
    before = (other / "last.pt").read_bytes()
    log = tmp_path / "log"
    for command in (plain, [*plain, "--out", str(tmp_path / "typed")]):
        pair = start_two(command, log, TORCHELASTIC_RESTART_COUNT="1")
        assert [children.ended(child) for child in pair] == [0, 0], log.read_text()[-3000:]
    assert (other / "last.pt").read_bytes() == before
    for made in (tmp_path / "runs" / "scenes-toy-bn-2", tmp_path / "typed"):
        assert Checkpoint.from_file(made / "last.pt").step == 4
        (made / "last.pt").unlink()  # as if it had died before the first one
    pair = start_two([*plain, "--out", str(tmp_path / "typed")], log, TORCHELASTIC_RESTART_COUNT="2")
    assert [children.ended(child) for child in pair] == [0, 0], log.read_text()[-3000:]
    assert Checkpoint.from_file(tmp_path / "typed" / "last.pt").step == 4


def plant_nan_on_rank_1() -> None:
    whole = TrainStep.__call__

    def spoiled(step: TrainStep, batch: Batch) -> torch.Tensor:
        if ranks.rank() == 1 and step.clock.step == 2:
            batch.targets.boxes[:, 0] = float("nan")
        return whole(step, batch)

    TrainStep.__call__ = spoiled  # type: ignore[method-assign]


@pytest.mark.parametrize("norm", ["syncbn", "gn"])
def test_what_is_not_finite_on_one_rank_is_named_and_ends_both(
    scenes: Path, toy_cfg: str, tmp_path: Path, norm: str
) -> None:
    """syncbn asks the other rank in each forward, in which nobody may be missing."""

    log = tmp_path / "log"
    pair = start_two(flags(scenes, toy_cfg, tmp_path / "run", "--norm", norm), log, before=plant_nan_on_rank_1)
    assert [children.ended(child) for child in pair] == [3, 3], log.read_text()[-3000:]
    assert log.read_text().count("error: step 3: a box of ") == 1
    assert "Traceback" not in log.read_text()
    assert Checkpoint.from_file(tmp_path / "run" / "last.pt").step == 0


def on_rank_1(step_number: int, error: Exception, above: int) -> None:
    """Raise the error in its forwards of more than so many images, from that step on."""
    forward, call = Network.forward, TrainStep.__call__
    steps = []

    def failing(network: Network, images: torch.Tensor) -> object:
        if ranks.rank() == 1 and network.training and len(steps) >= step_number and len(images) > above:
            raise error
        return forward(network, images)

    Network.forward = failing  # type: ignore[method-assign]
    TrainStep.__call__ = lambda *given: (steps.append(1), call(*given))[1]  # type: ignore[method-assign]


@pytest.mark.parametrize("norm", ["cmbn:carry", "cbn:burn_in_steps=1"])
def test_memory_that_ran_out_on_one_rank_costs_only_time(scenes: Path, toy_cfg: str, tmp_path: Path, norm: str) -> None:
    """All ranks cut finer from the first batch on, as if that had been typed."""
    log, cut = tmp_path / "log", ("--norm", norm, "--batch-size", "8", "--subdivisions")
    ran_out = partial(on_rank_1, 0, torch.OutOfMemoryError("CUDA out of memory"), 2)
    for name, subdivisions, before in (("coarse", "1", ran_out), ("fine", "2", None)):
        for child in start_two(flags(scenes, toy_cfg, tmp_path / name, *cut, subdivisions), log, before=before):
            assert children.ended(child) == 0, log.read_text()[-3000:]
    assert log.read_text().count("out of memory with 4 images per forward: going on with --subdivisions 2") == 1
    children.assert_same_training(tmp_path / "fine", tmp_path / "coarse")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("a.jpg: is gone"), "error: a.jpg: is gone"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory with one image per forward"),
    ],
)
def test_an_error_of_one_rank_ends_all_with_its_sentence(
    scenes: Path, toy_cfg: str, tmp_path: Path, error: Exception, said: str
) -> None:
    log = tmp_path / "log"
    pair = start_two(flags(scenes, toy_cfg, tmp_path / "run"), log, before=partial(on_rank_1, 2, error, 0))
    assert [children.ended(child) for child in pair] == [2, 2], log.read_text()[-3000:]
    text = log.read_text()
    assert text.count("error: ") == text.count(said) == 1 and "Traceback" not in text, text[-3000:]


def test_a_rank_that_was_killed_is_told_by_the_other(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pair = start_two(flags(scenes, toy_cfg, tmp_path / "run", "--epochs", "50", "--save-minutes", "0"), log)
    children.wait_for_step(tmp_path / "run", 2)
    pair[1].kill()
    assert [children.ended(child) for child in pair] == [2, -signal.SIGKILL], log.read_text()[-3000:]
    text = log.read_text()
    assert "error: rank 0 has lost the connection to the others" in text and "Traceback" not in text, text[-3000:]


def test_a_batch_that_ranks_cannot_share_is_a_sentence(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    pair = start_two(
        flags(scenes, toy_cfg, tmp_path / "run", "--batch-size", "3", "--subdivisions", "1"), tmp_path / "log"
    )
    assert [children.ended(child) for child in pair] == [2, 2]
    assert "error: --batch-size 3 is not divisible by 2 processes" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_torchrun_restarts_a_job_whose_rank_was_killed(root: Path, scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    command = flags(scenes, toy_cfg, run, "--epochs", "12", "--save-minutes", "0")
    job = subprocess.Popen(
        [*torchrun, "train.py", *command], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    children.wait_for_step(run, 3, patience_s=300)
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[0]), signal.SIGKILL)
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said[-3000:]
    assert "Signal 9 (SIGKILL)" in said or "exitcode: -9" in said
    assert Checkpoint.from_file(run / "last.pt").step == 48
