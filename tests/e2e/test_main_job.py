"""The pages from end to end, on a few digit scenes and the smallest nets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import train
from cfg.parse import CfgError
from data.digits import make_digits
from engine.job import open_run, parse_job
from evaluation.evaluator import Evaluator
from tests.e2e.conftest import TOY_CFG
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.page import run_page
from utils.stop import Stop, Stopped

CBN = "cbn:burn_in_steps=2"


def page(root: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, str(root / name), *flags], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_train_evaluate_detect(root: Path, scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--data", str(scenes), "--cfg", toy_cfg, "--norm", "cmbn", "--epochs", "2", "--workers", "1")
    said = page(root, "train.py", *flags, "--out", str(run)).stdout
    assert "Average Precision  (AP) @[ IoU=0.50:0.95" in said
    for name in ("settings.json", "results.csv", "best.pt", "last.pt", "tensorboard"):
        assert (run / name).exists(), name
    for name in ("first_batch", "predictions", "results", "pr_curves", "confusion"):
        assert cv2.imread(str(run / f"{name}.png")).std() > 0, name
    assert len((run / "results.csv").read_text().splitlines()) == 3

    report = tmp_path / "report"
    weights = str(run / "best.pt")
    page(root, "evaluate.py", "--weights", weights, "--data", str(scenes), "--out", str(report), "--workers", "0")
    metrics = json.loads((report / "metrics.json").read_text())
    by_hand = coco_by_hand(scenes / "annotations" / "instances_val.json", report / "detections.json")
    assert list(metrics.values())[:12] == pytest.approx(by_hand, abs=1e-12)
    low, high = metrics["AP_interval"]
    assert low <= metrics["AP"] <= high
    thresholds = json.loads((run / "metrics.json").read_text())["thresholds"] or {}
    assert thresholds == Checkpoint.from_file(run / "best.pt").thresholds
    assert thresholds == Checkpoint.from_file(run / "best.safetensors").thresholds

    found = tmp_path / "found"
    extras = ("--save-json", "--save-txt", "--save-crops", "--confidence", "0.01", "--out", str(found))
    said = page(root, "detect.py", "--weights", weights, *extras, str(scenes / "val")).stdout
    assert len(list(found.glob("*.png"))) == len(list((found / "labels").glob("*.txt"))) == 8
    rows = json.loads((found / "detections.json").read_text())
    assert [Path(row["file"]).name for row in rows] == [f"{i:06d}.png" for i in range(8)]
    crops = len(list((found / "crops").rglob("*.png"))) if (found / "crops").exists() else 0
    assert crops == sum(len(row["objects"]) for row in rows)
    assert said.splitlines()[-1] == f"8 images annotated; they are in {found}"


def coco_by_hand(ground_truth: Path, detections: Path) -> list[float]:
    truth = COCO(str(ground_truth))
    rows = json.loads(detections.read_text())
    if not rows:
        return [0.0] * 12
    evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.parametrize(
    ("norm", "stop"),
    [("bn", ("--epochs", "1")), ("cmbn", ("--epochs", "1")), (CBN, ("--epochs", "1")), (CBN, ("--max-steps", "6"))],
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    scenes: Path, toy_cfg: str, tmp_path: Path, norm: str, stop: tuple[str, str]
) -> None:
    """Stopped after an epoch of 4 steps, or in the middle of the second one."""
    common = ["--data", str(scenes), "--cfg", toy_cfg, "--norm", norm, "--workers", "0", "--evals", "1"]
    common += ["--lr-policy", "constant"]  # a cosine depends on the length of the run, and so would the weights
    train.main([*common, "--epochs", "3", "--out", str(tmp_path / "whole")])
    train.main([*common, *stop, "--out", str(tmp_path / "parts")])
    train.main(["--resume", str(tmp_path / "parts"), "--epochs", "3", "--workers", "0"])
    whole, parts = (Checkpoint.from_file(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert parts.training.state["step"] == whole.training.state["step"] == 12
    for name, tensor in whole.training.state["network"].items():
        assert torch.equal(tensor, parts.training.state["network"][name]), name
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, parts.weights[name]), name


class StopAfter(Stop):
    """Wished for while that step is taken."""

    def __init__(self, *, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left <= 0


def test_of_equally_good_weights_the_later_are_kept(scenes: Path, toy_cfg: str, tmp_path: Path, monkeypatch) -> None:
    """As when nothing is found yet, or the split has no objects."""
    monkeypatch.setattr(Evaluator, "measure", lambda *_, **__: SimpleNamespace(AP=0.0, AP50=0.0, words=str))
    common = ["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--device", "cpu"]
    job = parse_job([*common, "--epochs", "3", "--evals", "3", "--out", str(tmp_path / "run")])
    train.train(job, open_run(job))
    assert Checkpoint.from_file(tmp_path / "run" / "best.pt").step == 12


def test_a_run_that_is_told_to_end_before_its_first_evaluation_is_measured(
    scenes: Path, toy_cfg: str, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    common = ["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--device", "cpu", "--save-minutes", "0"]
    job = parse_job([*common, "--epochs", "50", "--evals", "1", "--out", str(run)])
    with pytest.raises(Stopped):
        train.train(job, open_run(job), StopAfter(steps=5))
    assert Checkpoint.from_file(run / "last.pt").epochs_done == 1 and not (run / "best.pt").exists()
    train.main(["--resume", str(run), "--epochs", "1", "--workers", "0"])
    assert "Average Precision" in capsys.readouterr().out
    best, last = (Checkpoint.from_file(run / name) for name in ("best.pt", "last.pt"))
    assert best.step == 5 and last.best_ap == best.best_ap > -1


@pytest.mark.parametrize(("burn_in", "is_warned"), [("3", False), ("4", True)])
def test_a_norm_that_never_begins_is_said(
    scenes: Path, toy_cfg: str, tmp_path: Path, capsys, burn_in: str, is_warned: bool
) -> None:
    common = ["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--device", "cpu", "--max-steps", "4"]
    train.main([*common, "--norm", f"cbn:burn_in_steps={burn_in}", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "schedule  4 steps: cosine from 0.006" in said
    warning = "warning: burn_in_steps=4 is the whole training: cbn:burn_in_steps=4 is plain batch norm here"
    assert (warning in said) == is_warned


def test_two_images_can_be_learnt_by_heart(toy_cfg: str, tmp_path: Path) -> None:
    """Loss near 0 and every object found: assignment, loss, decoder and evaluation speak of the same boxes."""
    two = make_digits(tmp_path / "two", counts={"train": 2, "val": 2}, hw=(64, 64), shift=0.0)
    annotations = two / "annotations"
    (annotations / "instances_val.json").write_text((annotations / "instances_train.json").read_text())
    for image in (two / "train").iterdir():
        (two / "val" / image.name).write_bytes(image.read_bytes())
    still = ["--mosaic", "0", "--jitter", "0", "--resize", "1", "--saturation", "1", "--exposure", "1", "--hue", "0"]
    flags = ["--data", str(two), "--cfg", "yolov4-pico", "--image-size", "64", "--norm", "cmbn", "--workers", "0"]
    speed = ["--epochs", "400", "--batch-size", "2", "--subdivisions", "2", "--evals", "1", "--weight-decay", "0"]
    # With the cfg's rate, 0.005, which is for batches of 16, the boxes end well or less well by chance.
    rate = ["--burn-in-steps", "10", "--learning-rate", "0.002"]
    train.main([*flags, *still, *speed, *rate, "--out", str(tmp_path / "run")])
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    losses = [float(row.split(",")[3]) for row in rows[1:]]
    assert losses[-1] < 0.01 * losses[0]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["AP50"] > 0.95
    assert metrics["AP"] > 0.9


def test_fine_tuning_takes_over_network_and_norm(scenes: Path, toy_cfg: str, tmp_path: Path, capsys) -> None:
    common = ["--data", str(scenes), "--workers", "0", "--epochs", "1"]
    train.main([*common, "--cfg", toy_cfg, "--norm", "gn", "--out", str(tmp_path / "first")])
    capsys.readouterr()
    train.main([*common, "--weights", str(tmp_path / "first" / "best.pt"), "--out", str(tmp_path / "second")])
    said = capsys.readouterr().out
    assert "0 re-initialized" in said
    settings = json.loads((tmp_path / "second" / "settings.json").read_text())
    assert (settings["norm"], settings["image_size"]) == ("gn", [64, 64])


# --- bad input: one sentence, exit code 2 ----------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: str, code: int = 2) -> str:
    """What train.py says on stderr when it refuses these flags."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as ended:
        run_page(train.main, CfgError)
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data", "no/such/place"], "no/such/place: no such file or folder"),
        (["--norm", "batch"], "unknown norm 'batch'"),
        (["--norm", "bn", "--norm-window", "3"], "train.py has no --norm-window: write --norm cbn:window=8"),
        (["--batch-size", "6", "--subdivisions", "4"], "--batch-size 6 is not divisible by --subdivisions 4"),
        (["--cfg", "yolov4-tny"], "did you mean"),
        (["--image-size", "100"], "an input of 100x100 does not fit: sides must be multiples of 16"),
        (["--image-size", "big"], "'big' is not a size"),
        (["--val-split", "exam"], "has no split 'exam'"),
        (["--weights", "nothing.pt"], "nothing.pt: no such checkpoint"),
        (["--resume", "nowhere"], "nowhere: no such checkpoint"),
        (["--resume", "nowhere", "--norm", "bn"], "--norm cannot be changed"),
        (["--device", "cuda:77"], "cuda:77"),
        (
            ["--lr-steps", "1", "2", "--lr-scales", "0.1", "--lr-policy", "steps"],
            "--lr-steps has 2 steps and --lr-scales 1 factor: each step needs one",
        ),
        (["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
    ],
)
def test_bad_flags(capsys, monkeypatch, tmp_path, scenes, flags: list[str], sentence: str) -> None:
    given = [] if "--resume" in flags else ["--out", str(tmp_path / "run"), "--workers", "0"]
    given += [] if {"--data", "--resume"} & set(flags) else ["--data", str(scenes)]
    assert sentence in refused(capsys, monkeypatch, *given, *flags)


def test_a_malformed_cfg_names_file_and_line(capsys, monkeypatch, tmp_path, scenes) -> None:
    bad = tmp_path / "bad.cfg"
    bad.write_text(TOY_CFG.replace("filters=16", "filters=many"))
    said = refused(capsys, monkeypatch, "--data", str(scenes), "--cfg", str(bad))
    line = TOY_CFG.splitlines().index("filters=16") + 1
    assert said.startswith(f"error: {bad}:{line}: ")


def test_an_empty_data_set(capsys, monkeypatch, tmp_path) -> None:
    assert str(tmp_path) in refused(capsys, monkeypatch, "--data", str(tmp_path))


def test_an_existing_run_is_not_overwritten(capsys, monkeypatch, tmp_path, scenes) -> None:
    (tmp_path / "precious.pt").write_text("weights")
    assert "--resume" in refused(capsys, monkeypatch, "--data", str(scenes), "--out", str(tmp_path))
    assert (tmp_path / "precious.pt").read_text() == "weights"


def test_a_diverging_loss_stops_with_the_images_named(capsys, monkeypatch, tmp_path, scenes, toy_cfg) -> None:
    flags = ["--data", str(scenes), "--cfg", toy_cfg, "--optimizer", "sgd", "--learning-rate", "1000", "--workers", "0"]
    said = refused(capsys, monkeypatch, *flags, "--out", str(tmp_path / "run"), code=3)
    assert re.search(r"error: step \d: the (output|gradient|weights|loss) .* not finite.* [^ ]*\d{6}\.png", said), said


def test_a_loss_that_explodes_is_a_failure(capsys, monkeypatch, tmp_path, scenes, toy_cfg) -> None:
    flags = [
        "--data",
        str(scenes),
        "--cfg",
        toy_cfg,
        "--optimizer",
        "sgd",
        "--learning-rate",
        "0.3",
        "--burn-in-steps",
        "20",
        "--epochs",
        "12",
    ]
    run = tmp_path / "run"
    said = refused(capsys, monkeypatch, *flags, "--batch-size", "4", "--workers", "0", "--out", str(run), code=3)
    assert re.search(r"error: step \d+: the (loss has risen from .* --optimizer adamw|.* not finite)", said), said


def test_adamw_has_a_rate_of_its_own_by_the_batch(scenes, toy_cfg, tmp_path) -> None:
    common = ["--data", str(scenes), "--cfg", toy_cfg, "--optimizer", "adamw", "--batch-size"]
    optims = [parse_job([*common, size]).options.optim for size in ("4", "16")]
    assert [(o.learning_rate, o.momentum) for o in optims] == [(0.006, 0.9), (0.012, 0.9)]
    typed = parse_job([*common, "4", "--learning-rate", "0.01"])
    assert typed.options.optim.learning_rate == 0.01 and typed.origins["learning_rate"] == "typed"
    with pytest.raises(UserError, match="--momentum is that of --optimizer sgd"):
        parse_job([*common, "4", "--momentum", "0.8"])


# --- the real thing --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_yolov4_trains_a_step_and_evaluates_at_608(tmp_path: Path) -> None:
    scenes = make_digits(tmp_path / "one", counts={"train": 1, "val": 1})
    flags = ["--data", str(scenes), "--cfg", "yolov4", "--norm", "cmbn", "--batch-size", "1", "--subdivisions", "1"]
    train.main([*flags, "--epochs", "1", "--workers", "0", "--burn-in-steps", "0", "--out", str(tmp_path / "run")])
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["total_steps"] == 1
    assert Checkpoint.from_file(tmp_path / "run" / "last.pt").input_hw == (608, 608)
    assert "AP" in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_steps_end_a_run_in_the_middle_of_an_epoch(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    flags = ["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--multi-scale", "1.5"]
    train.main([*flags, "--max-steps", "6", "--out", str(tmp_path / "run")])
    checkpoint = Checkpoint.from_file(tmp_path / "run" / "last.pt")
    assert checkpoint.training.state["step"] == checkpoint.step == 6
