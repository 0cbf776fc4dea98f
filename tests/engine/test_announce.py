"""What a training prints before its first step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from engine.announce import announce, flag, idle_settings, optimizer_in_words, settings_lines
from engine.job import parse_job
from engine.trainer import Trainer
from options import TrainOptions
from utils.flags import flatten, parse_flags, resolve
from utils.stop import Stop


def test_lines_are_in_the_order_in_which_one_asks(scenes: Path, toy_cfg: str, tmp_path: Path, capsys) -> None:
    job = parse_job(["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--device", "cpu", "--freeze", "1"])
    run = Trainer(job, tmp_path / "run", Stop())
    assert capsys.readouterr().out == "", "building prints nothing"
    announce(run)
    labels = [line[:10].strip() for line in capsys.readouterr().out.splitlines() if not line.startswith("warning:")]
    order = ["norm", "data", "network", "freeze", "optimizer", "schedule", "device", "precision", "run", "settings"]
    assert [label for label in dict.fromkeys(labels) if label] == order


def test_settings_are_the_flags_that_differ_from_the_defaults(scenes: Path, toy_cfg: str) -> None:
    """Typed ones first; a typed default is not shown."""
    job = parse_job(["--data", str(scenes), "--cfg", toy_cfg, "--mosaic", "0.7", "--workers", "2", "--no-flip"])
    typed, from_cfg, from_optimizer = settings_lines(job)
    assert typed == f"--data {scenes}  --cfg {toy_cfg}  --mosaic 0.7  --no-flip"
    assert from_cfg.startswith("from the cfg: ") and "--letterbox" in from_cfg and "rate" not in from_cfg
    assert from_optimizer == (
        "from the optimizer: --max-steps 1200  --batch-size 4  --subdivisions 2  --optimizer adamw  "
        "--learning-rate 0.006"
    )
    assert optimizer_in_words(job) == "AdamW, weight decay 0.0001; batch 4 = 2 forwards of 2"


def test_sgd_takes_the_numbers_of_the_cfg(scenes: Path, toy_cfg: str) -> None:
    job = parse_job(["--data", str(scenes), "--cfg", toy_cfg, "--optimizer", "sgd"])
    _, from_cfg, *_ = settings_lines(job)
    assert "--learning-rate 0.005  --lr-policy constant" in from_cfg
    assert optimizer_in_words(job) == "SGD, momentum 0.9, weight decay 0.0001; batch 4 = 2 forwards of 2"


@pytest.mark.parametrize(
    "argv",
    [
        ["--image-size", "96x128"],
        ["--lr-steps", "10", "20", "--lr-scales", "0.1", "0.5"],
        ["--no-letterbox", "--seed", "7"],
    ],
)
def test_a_shown_flag_can_be_typed(argv: list[str]) -> None:
    given = parse_flags(TrainOptions, argv)
    shown = [word for name, value in given.items() for word in flag(name, value).split()]
    assert flatten(resolve(TrainOptions, parse_flags(TrainOptions, shown))) == flatten(resolve(TrainOptions, given))


@pytest.mark.parametrize(
    "argv, warning",
    [
        (
            ["--mosaic", "0", "--close-mosaic", "0.5"],
            "--close-mosaic has nothing to end: mosaic, mixup and cutmix are off",
        ),
        (["--evals", "1", "--patience", "5"], "--patience 5 cannot end the training early: it has 1 evaluation"),
        (["--lr-policy", "steps"], "the policy steps without --lr-steps is a constant rate"),
        (["--burn-in-steps", "20"], "a burn-in of 20 steps is the whole training: the rate stays under 0.01"),
        (
            ["--final-learning-rate", "0.1", "--lr-policy", "cosine"],
            "the learning rate grows from 0.01 to --final-learning-rate 0.1",
        ),
    ],
)
def test_a_setting_that_cannot_do_anything_is_named(
    scenes: Path, toy_cfg: str, tmp_path: Path, argv: list[str], warning: str
) -> None:
    page = ["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--device", "cpu", "--max-steps", "20"]
    run = Trainer(parse_job([*page, "--learning-rate", "0.01", *argv]), tmp_path / "run", Stop())
    assert idle_settings(run) == [warning]


def test_forwards_of_unequal_size_are_named(scenes: Path, toy_cfg: str) -> None:
    job = parse_job(["--data", str(scenes), "--cfg", toy_cfg, "--batch-size", "3", "--subdivisions", "3"])
    assert optimizer_in_words(job).endswith("batch 3 = 3 forwards of 1")
    optim = dataclasses.replace(job.options.optim, batch_size=3, subdivisions=2)
    job = dataclasses.replace(job, options=dataclasses.replace(job.options, optim=optim))
    assert optimizer_in_words(job).endswith("batch 3 = 2 forwards of 1 or 2")
