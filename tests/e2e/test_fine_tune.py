"""Fine-tuning from a checkpoint of other classes: frozen layers, slower layers, and a run that goes on with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from cfg.plan import load_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.stored_network import make_checkpoint
from utils.errors import UserError

FROZEN = ("layers.0.",)
FLAGS = ["--workers", "0", "--device", "cpu", "--evals", "1", "--batch-size", "4", "--subdivisions", "2"]


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of the time of a short run."""
    for place in (
        "evaluation.evaluator.plot_pr_curves",
        "evaluation.evaluator.plot_confusion",
        "engine.result_files.plot_results",
    ):
        monkeypatch.setattr(place, lambda *_: None)


@pytest.fixture
def other_classes(tmp_path: Path, toy_cfg: str) -> Path:
    """A checkpoint of the toy network for three classes, with statistics that no data set has."""
    torch.manual_seed(5)
    plan, options = load_plan(toy_cfg, classes=3), NormOptions(norm="cmbn")
    network = Network(plan, norm_factory(options))
    for name, tensor in network.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 2)
    weights = network.state_dict()
    make_checkpoint(plan, options, weights, class_names=("a", "b", "c"), letterbox=True).to_file(tmp_path / "other.pt")
    return tmp_path / "other.pt"


def weights_in(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["weights"]


def test_frozen_layers_are_those_of_the_start_and_the_run_goes_on_to_the_bit(
    tmp_path: Path, scenes: Path, toy_cfg: str, other_classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--data", str(scenes), "--cfg", toy_cfg, "--weights", str(other_classes), "--norm", "cmbn", *FLAGS]
    tuning = ["--freeze", "1", "--backbone-rate", "0.1", "--lr-policy", "constant", "--ema-decay", "0.5"]
    runs = {name: tmp_path / name for name in ("whole", "halves")}
    train.main([*start, *tuning, "--epochs", "2", "--out", str(runs["whole"])])
    said = capsys.readouterr().out
    assert (
        "0 re-initialized; 0 of 10 classes are known by name, the heads' rows of the others are re-initialized" in said
    )
    assert "freeze    layers 0 to 0, with their norm statistics: " in said
    final, before = weights_in(runs["whole"] / "last.pt"), weights_in(other_classes)
    for name, tensor in final.items():
        same = tensor.shape == before[name].shape and torch.equal(tensor, before[name])
        assert same == name.startswith(FROZEN), name

    train.main([*start, *tuning, "--epochs", "1", "--out", str(runs["halves"])])
    train.main(["--resume", str(runs["halves"]), "--epochs", "2"])
    for name, tensor in weights_in(runs["halves"] / "last.pt").items():
        assert torch.equal(tensor, final[name]), name
    settings = torch.load(runs["halves"] / "last.pt", weights_only=True)["settings"]
    assert (settings["freeze"], settings["backbone_rate"]) == (1, 0.1)


def test_precise_statistics_are_not_for_frozen_layers(
    tmp_path: Path, scenes: Path, toy_cfg: str, other_classes: Path
) -> None:
    start = ["--data", str(scenes), "--cfg", toy_cfg, "--weights", str(other_classes), "--norm", "cmbn", *FLAGS]
    train.main([*start, "--freeze", "1", "--precise-bn", "8", "--max-steps", "2", "--out", str(tmp_path / "run")])
    best, before = weights_in(tmp_path / "run" / "best.pt"), weights_in(other_classes)
    moved = {name for name, tensor in best.items() if "running_mean" in name and not torch.equal(tensor, before[name])}
    assert moved == {"layers.1.norm.running_mean"}


def test_without_weights_it_is_a_warning_and_all_layers_an_error(
    tmp_path: Path, scenes: Path, toy_cfg: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--data", str(scenes), "--cfg", toy_cfg, "--norm", "bn", *FLAGS, "--max-steps", "1"]
    with pytest.raises(UserError, match=r"^--freeze 3: none of the network's 4 layers is left to train$"):
        train.main([*start, "--freeze", "3", "--out", str(tmp_path / "run")])
    train.main([*start, "--freeze", "1", "--out", str(tmp_path / "other")])
    assert "warning: without --weights the 1 frozen layers keep their random weights" in capsys.readouterr().out
