"""Flags that change what a training takes, and not what comes out of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import detect
import evaluate
import train
from tests.e2e import children
from utils.checkpoint import Checkpoint


def flags(scenes: Path, cfg: str, run: Path, *more: str) -> list[str]:
    common = ["--data", str(scenes), "--cfg", cfg, "--workers", "0", "--epochs", "2", "--evals", "1"]
    return [*common, "--ema-decay", "0.9", "--out", str(run), *more]


@pytest.mark.parametrize("amp", [("--amp", "off"), ("--amp", "bf16", "--channels-last")])
def test_recomputed_activations_train_to_the_same_bits(
    scenes: Path, toy_cfg: str, tmp_path: Path, amp: tuple[str, ...]
) -> None:
    for name, more in (("plain", ()), ("recomputed", ("--checkpoint-activations",))):
        train.main(flags(scenes, toy_cfg, tmp_path / name, "--norm", "cbn:burn_in_steps=1", *amp, *more))
    children.assert_same_training(tmp_path / "plain", tmp_path / "recomputed")


def test_offloading_without_a_gpu_says_that_it_does_nothing(scenes: Path, toy_cfg: str, tmp_path: Path, capsys) -> None:
    said = {}
    for name, more in (("plain", ()), ("offloaded", ("--offload-activations",))):
        train.main(flags(scenes, toy_cfg, tmp_path / name, *more))
        said[name] = capsys.readouterr().out
    children.assert_same_training(tmp_path / "plain", tmp_path / "offloaded")
    assert [text.count("--offload-activations has no effect without a CUDA GPU") for text in said.values()] == [0, 1]


@pytest.mark.parametrize("speed", ["--channels-last", pytest.param("--compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", ["bn", "cmbn"])
def test_other_ways_to_compute_differ_by_rounding(
    scenes: Path, toy_cfg: str, tmp_path: Path, norm: str, speed: str
) -> None:
    for name, more in (("plain", ()), ("fast", (speed,))):
        train.main(flags(scenes, toy_cfg, tmp_path / name, "--norm", norm, *more))
    plain, fast = (Checkpoint.from_file(tmp_path / name / "best.pt").weights for name in ("plain", "fast"))
    assert plain.keys() == fast.keys()
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], rtol=1e-3, atol=1e-4)


def test_a_profile_is_a_trace_and_a_table(scenes: Path, toy_cfg: str, tmp_path: Path, capsys) -> None:
    train.main(flags(scenes, toy_cfg, tmp_path / "run", "--profile", "--batch-size", "1", "--subdivisions", "1"))
    trace = json.loads((tmp_path / "run" / "profile.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert "aten::convolution" in names
    said = capsys.readouterr().out
    assert "Self CPU" in said and "waiting for data" in said
    assert Checkpoint.from_file(tmp_path / "run" / "last.pt").step == 32  # all steps, timed or not


def test_safetensors_detect_and_evaluate_like_the_checkpoint(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main(flags(scenes, toy_cfg, run, "--norm", "cmbn"))
    for kind in ("pt", "safetensors"):
        weights = ["--weights", str(run / f"best.{kind}")]
        evaluate.main([*weights, "--data", str(scenes), "--workers", "0", "--out", str(tmp_path / kind)])
        detect.main(
            [
                *weights,
                str(scenes / "val"),
                "--save-json",
                "--confidence",
                "0.01",
                "--out",
                str(tmp_path / f"found-{kind}"),
            ]
        )
    assert (tmp_path / "pt" / "detections.json").read_bytes() == (
        tmp_path / "safetensors" / "detections.json"
    ).read_bytes()
    found = [(tmp_path / f"found-{kind}" / "detections.json").read_bytes() for kind in ("pt", "safetensors")]
    assert found[0] == found[1]
