"""Frozen, recalibrated, reported and folded statistics, through the pages."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch

import detect
import evaluate
import train
from cfg.parse import CfgError
from engine.step import TrainStep
from tests.e2e.conftest import TOY_CFG
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.page import run_page
from utils.structures import Batch

NORM = "layers.1.norm"


@pytest.fixture
def flags(scenes: Path, toy_cfg: str) -> list[str]:
    return ["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--evals", "1"]


@pytest.fixture(scope="session")
def trained(scenes: Path, toy_cfg: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pt of a short training with cmbn, 2 images at a time in batches of 4."""
    run = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--data", str(scenes), "--cfg", toy_cfg, "--norm", "cmbn", "--epochs", "2", "--workers", "0"]
    train.main([*flags, "--out", str(run)])
    return run / "best.pt"


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.from_file(path).weights


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> set[str]:
    """The last part of the names of tensors that are not the same."""
    assert ours.keys() == theirs.keys()
    return {name.rpartition(".")[2] for name in ours if not torch.equal(ours[name], theirs[name])}


# --- training ------------------------------------------------------------------------------------------------


def test_precise_statistics_replace_those_of_the_best_weights(flags, tmp_path, capsys):
    plain, precise = tmp_path / "plain", tmp_path / "precise"
    train.main([*flags, "--norm", "cmbn", "--epochs", "2", "--out", str(plain)])
    capsys.readouterr()
    train.main([*flags, "--norm", "cmbn", "--epochs", "2", "--precise-bn", "6", "--out", str(precise)])
    said = capsys.readouterr().out
    changed = differing(weights_of(plain / "best.pt"), weights_of(precise / "best.pt"))
    assert changed == {"running_mean", "running_var"}
    assert differing(weights_of(plain / "last.pt"), weights_of(precise / "last.pt")) == set()
    (line,) = (line for line in said.splitlines() if "running averages" in line)
    assert re.fullmatch(
        r"AP \d+\.\d with running averages, \d+\.\d with statistics of 6 images of scenes train; "
        r"best\.pt has the latter",
        line,
    )
    said_ap = float(re.search(r", (\d+\.\d) with statistics", line)[1]) / 100
    assert json.loads((precise / "metrics.json").read_text())["AP"] == pytest.approx(said_ap, abs=5.1e-4)


@pytest.mark.parametrize("norm", ["bn", "cbn"])
def test_statistics_frozen_from_the_start_stay_as_loaded(flags, trained, tmp_path, norm):
    run = tmp_path / "run"
    start = ["--weights", str(trained), "--norm", norm, "--norm-eval", "--epochs", "1"]
    train.main([*flags, *start, "--out", str(run)])
    content = Checkpoint.from_file(run / "last.pt")
    before, after = weights_of(trained), content.training.state["network"]
    assert differing(before, after) == {"weight", "bias"}
    histories = content.training.state["ranks"][0]["norm_histories"]
    assert not any(
        buffer.numel() for name, buffer in histories.items() if "ring" in name
    )  # a window that nobody looks through is not allocated
    assert not any(buffer.any() for name, buffer in histories.items() if name.endswith("_count"))


def test_statistics_frozen_in_the_middle_survive_a_resume(flags, tmp_path, monkeypatch):
    """Frozen from step 5 of 12; interrupted in step 10, resumed at step 8."""
    common = [*flags, "--norm", "cmbn", "--epochs", "3", "--evals", "3", "--ema-decay", "0.9"]
    common += ["--norm-freeze-after", "0.4", "--learning-rate", "0.0005"]
    train.main([*common, "--out", str(tmp_path / "whole")])
    whole, stop = TrainStep.__call__, 9

    def interrupted(step: TrainStep, batch: Batch) -> torch.Tensor:
        if step.clock.step == stop:
            raise KeyboardInterrupt
        return whole(step, batch)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*common, "--out", str(tmp_path / "parts")])
    monkeypatch.undo()
    half_way = Checkpoint.from_file(tmp_path / "parts" / "last.pt")
    assert half_way.step == 8
    train.main(["--resume", str(tmp_path / "parts"), "--workers", "0"])
    whole, parts = (Checkpoint.from_file(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert differing(whole.training.state["network"], parts.training.state["network"]) == set()
    assert differing(whole.weights, parts.weights) == set()
    frozen = [state.training.state["network"][f"{NORM}.running_var"] for state in (half_way, whole)]
    assert torch.equal(*frozen)
    assert whole.training.state["network"][f"{NORM}.num_batches_tracked"] == 5


@pytest.mark.parametrize("after", ["cbn", "mabn", "bn"])
def test_another_norm_takes_over(flags, trained, tmp_path, capsys, after):
    train.main([*flags, "--weights", str(trained), "--norm", after, "--max-steps", "2", "--out", str(tmp_path / "run")])
    assert "5 layers from" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["norm"].partition(":")[0] == after


def test_what_the_norm_sees_is_announced(flags, tmp_path, capsys):
    train.main([*flags, "--norm", "bn", "--max-steps", "1", "--out", str(tmp_path / "bn")])
    said = capsys.readouterr().out
    assert "norm      bn: mini-batches of 2 images, statistics of 2\n" in said
    assert "\nwarning: bn normalizes by the statistics of 2 images, fewer than 8: --norm cmbn pools" in said
    train.main([*flags, "--norm", "cmbn", "--max-steps", "1", "--out", str(tmp_path / "cmbn")])
    said = capsys.readouterr().out
    assert "norm      cmbn: mini-batches of 2 images, statistics of up to 4; " in said
    assert "\nwarning: cmbn normalizes by the statistics of 4 images, fewer than 8: --norm cbn" in said


def test_the_first_line_of_a_run_says_what_auto_chose_and_why(flags, tmp_path, capsys):
    train.main([*flags, "--subdivisions", "4", "--max-steps", "1", "--out", str(tmp_path / "run")])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "norm      auto: cmbn:carry, because 1 image in a forward is fewer than 4"
    assert second.startswith("          cmbn:carry,burn_in_steps=0: mini-batches of 1 image, statistics of up to 4")


@pytest.mark.parametrize(
    ("images", "batch", "factor"), [(16, ["4", "4"], "1"), (1, ["4", "2"], "1"), (16, ["2", "2"], "4")]
)
def test_one_value_per_channel_is_said_before_the_first_step(tmp_path, scenes, images, batch, factor):
    """Cut too fine; a data set of one image; and an input that multi-scale training will draw some day."""
    side = 32 if factor == "1" else 64
    text = TOY_CFG.replace("stride=2", "stride=8").replace("=64", f"={side}")
    (tmp_path / "deep.cfg").write_text(text)
    if images == 1:
        scenes = train_on_one(scenes, tmp_path / "one")
    flags = ["--data", str(scenes), "--cfg", str(tmp_path / "deep.cfg"), "--workers", "0", "--max-steps", "1"]
    cut = ["--batch-size", batch[0], "--subdivisions", batch[1], "--multi-scale", factor]
    with pytest.raises(UserError, match=r"deep\.cfg:17: layer 1 has one value per channel .* at 32x32 px"):
        train.main([*flags, *cut, "--norm", "bn", "--out", str(tmp_path / "bn")])
    train.main([*flags, *cut, "--norm", "ln", "--out", str(tmp_path / "ln")])


def train_on_one(scenes: Path, copy: Path) -> Path:
    """The data set with a single training image."""
    (copy / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (copy / split).symlink_to(scenes / split)
        content = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
        if split == "train":
            first = content["annotations"][0]["image_id"]
            content["images"] = [image for image in content["images"] if image["id"] == first]
            content["annotations"] = [row for row in content["annotations"] if row["image_id"] == first]
        (copy / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return copy


# --- evaluation ----------------------------------------------------------------------------------------------


def test_recalibrated_on_another_data_set(scenes, trained, tmp_path, capsys):
    report = tmp_path / "report"
    flags = ["--weights", str(trained), "--data", str(scenes), "--workers", "0", "--out", str(report)]
    evaluate.main([*flags, "--recalibrate-on", str(scenes), "--recalibrate-images", "5", "--image-size", "96"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        rf"AP \d+\.\d with the statistics of {trained}, \d+\.\d with statistics of 5 images of scenes train: "
        rf"{report / 'recalibrated.pt'}",
        line,
    )
    before, after = Checkpoint.from_file(trained), Checkpoint.from_file(report / "recalibrated.pt")
    assert differing(before.weights, after.weights) == {"running_mean", "running_var"}
    assert after.input_hw == (96, 96)
    described = [replace(checkpoint, weights={}, input_hw=(96, 96)) for checkpoint in (before, after)]
    assert described[0] == described[1]
    detect.main(["--weights", str(report / "recalibrated.pt"), str(scenes / "val"), "--out", str(tmp_path / "found")])
    assert "8 images annotated" in capsys.readouterr().out


def test_statistics_of_each_batch_depend_on_its_size(scenes, trained, tmp_path):
    content = trained.read_bytes()
    found = {}
    for name, extra in {
        "population": [],
        "population by one": ["--batch-size", "1"],
        "batch": ["--norm-stats", "batch"],
        "batch by one": ["--norm-stats", "batch", "--batch-size", "1"],
    }.items():
        flags = ["--weights", str(trained), "--data", str(scenes), "--workers", "0", "--out", str(tmp_path / name)]
        evaluate.main([*flags, *extra])
        found[name] = scores(tmp_path / name)
    assert found["population by one"] == pytest.approx(found["population"], abs=1e-4)
    assert found["batch"] != pytest.approx(found["population"], abs=1e-4)
    assert found["batch by one"] != pytest.approx(found["batch"], abs=1e-4)
    assert trained.read_bytes() == content


def scores(folder: Path) -> list[float]:
    """Of the hundred best detections."""
    return sorted((row["score"] for row in json.loads((folder / "detections.json").read_text())), reverse=True)[:100]


def test_the_norm_report(scenes, trained, tmp_path, capsys):
    flags = ["--weights", str(trained), "--data", str(scenes), "--workers", "0", "--out", str(tmp_path / "report")]
    evaluate.main([*flags, "--norm-report"])
    text = (tmp_path / "report" / "norm_report.txt").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[2].split()[:6] == ["0", "conv", "3x3/4", "8", "|", lines[2].split()[5]]
    (norm,) = [line for line in lines if line.startswith("trained with ")]
    assert norm.startswith("trained with cmbn: mini-batches of 2 images, statistics of up to 4; ")
    assert [line.partition(":")[0] for line in lines[-3:]] == [
        "mini-batches of 2 images",
        "4 images pooled",
        "running statistics against these 8 images",
    ]
    assert cv2.imread(str(tmp_path / "report" / "norm_report.png")).std() > 0


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--norm-stats", "batch", "--norm-report"], "--norm-stats batch ignores the population's statistics"),
        (["--norm-stats", "batch", "--recalibrate-on", "digits"], "--norm-stats batch ignores"),
        (["--recalibrate-images", "5"], "--recalibrate-images is read with --recalibrate-on and --norm-report"),
        (["--recalibrate-on", "no/such/place"], "no/such/place: no such file or folder"),
    ],
)
def test_bad_flags_of_evaluate(scenes, trained, tmp_path, monkeypatch, capsys, extra, sentence):
    run = tmp_path / "run"
    flags = ["--weights", str(trained), "--data", str(scenes), "--workers", "0", "--out", str(run)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags, *extra])
    with pytest.raises(SystemExit) as ended:
        run_page(evaluate.main, CfgError)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not run.exists()


# --- norms without batch statistics --------------------------------------------------------------------------


def test_group_norm_has_no_population(flags, scenes, tmp_path):
    for knob in (["--precise-bn", "4"], ["--norm-eval"], ["--norm-freeze-after", "0.5"]):
        with pytest.raises(
            UserError, match=rf"^{knob[0]} is for norms with .*statistics.*, which --norm gn does not have$"
        ):
            train.main([*flags, "--norm", "gn", *knob, "--out", str(tmp_path / "refused")])
    train.main([*flags, "--norm", "gn", "--max-steps", "1", "--out", str(tmp_path / "gn")])
    best = str(tmp_path / "gn" / "best.pt")
    for extra in (["--norm-stats", "batch"], ["--norm-report"], ["--recalibrate-on", str(scenes)]):
        with pytest.raises(UserError, match="no norm with running statistics"):
            evaluate.main(["--weights", best, "--data", str(scenes), "--out", str(tmp_path / "refused"), *extra])
    detect.main(["--weights", best, str(scenes / "val"), "--out", str(tmp_path / "found")])
    assert len(list((tmp_path / "found").glob("*.png"))) == 8


@pytest.mark.parametrize("norm", ["gn:ws", "bcn:ws", "evonorm-s0", "frn", "ghost:size=1,ws"])
def test_a_norm_with_standardized_filters_or_more_parameters_goes_through_all_pages(
    flags, scenes, tmp_path, capsys, norm
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train.main([*flags, "--norm", norm, "--max-steps", "2", "--out", str(whole)])
    best = str(whole / "best.pt")
    assert json.loads((whole / "settings.json").read_text())["norm"] == norm
    train.main([*flags, "--weights", best, "--max-steps", "1", "--out", str(resumed)])
    said = capsys.readouterr().out
    assert f"norm      {norm}: " in said and "0 re-initialized" in said and "computes something else" not in said
    evaluate.main(["--weights", best, "--data", str(scenes), "--out", str(tmp_path / "measured")])
    detect.main(["--weights", best, str(scenes / "val"), "--out", str(tmp_path / "found")])
    assert len(list((tmp_path / "found").glob("*.png"))) == 8
