"""Norms by part, and a norm of one's own from a file outside the project, through the pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import detect
import evaluate
import train
from cfg.plan import load_plan
from engine.job import parse_job
from models.network import Network
from models.norms import own
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.stored_network import make_checkpoint
from tests.e2e.conftest import TOY_CFG
from utils.checkpoint import Checkpoint
from utils.errors import UserError

NECK = "[convolutional]\nbatch_normalize=1\nfilters=16\nsize=1\nactivation=leaky\n"
PARTS_CFG = TOY_CFG.replace("[convolutional]\nfilters=45", f"{NECK}[convolutional]\nfilters=45")  # layer 2, of the neck
FLAGS = ["--device", "cpu", "--evals", "1", "--batch-size", "4", "--subdivisions", "2", "--lr-policy", "constant"]


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
def cfg(tmp_path: Path) -> Path:
    path = tmp_path / "toy.cfg"
    path.write_text(PARTS_CFG)
    return path


def weights_in(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["weights"]


def differing(ours: Path, theirs: Path) -> list[str]:
    first, second = weights_in(ours), weights_in(theirs)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_heads_train_over_a_frozen_backbone_and_the_run_goes_on_to_the_bit(
    tmp_path: Path, scenes: Path, cfg: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From weights that were trained with batch norm."""
    plan, options = load_plan(str(cfg)), NormOptions(norm="bn")
    network, names = Network(plan, norm_factory(options)), tuple(map(str, range(10)))
    for name, tensor in network.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 2)
    before = tmp_path / "bn.pt"
    make_checkpoint(plan, options, network.state_dict(), class_names=names, letterbox=True).to_file(before)
    flags = ["--data", str(scenes), "--weights", str(before), *FLAGS, "--workers", "0", "--norm", "frozen"]
    flags += ["--norm-heads", "cbn:window=3,burn_in_steps=1"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.main([*flags, "--epochs", "2", "--out", str(whole)])
    said = capsys.readouterr().out
    assert "norm      frozen in layers 0 to 1, cbn:window=3,burn_in_steps=1 in layer 2\n" in said
    assert " 0 re-initialized" in said
    train.main([*flags, "--epochs", "1", "--out", str(halves)])
    train.main(["--resume", str(halves), "--epochs", "2"])
    assert differing(halves / "last.pt", whole / "last.pt") == []
    moved = [name for name in differing(whole / "last.pt", before) if "running" in name]
    assert moved == ["layers.2.norm.running_mean", "layers.2.norm.running_var"]
    report = ["--norm-report", "--workers", "0", "--data", str(scenes), "--out", str(tmp_path / "report")]
    evaluate.main(["--weights", str(whole / "best.pt"), *report])
    text = (tmp_path / "report" / "norm_report.txt").read_text()
    assert "\ntrained with layers 0 to 1: frozen: mini-batches of 2 images, running statistics, which stay\n" in text
    assert "\nlayer 2: cbn:window=3,burn_in_steps=1: mini-batches of 2 images, statistics of up to 6; " in text


def test_a_bad_norm_in_a_cfg_ends_the_start(scenes: Path, cfg: Path) -> None:
    lines = PARTS_CFG.split("\n")
    lines.insert(len(lines) - lines[::-1].index("filters=16"), "norm=gn:group=2")
    cfg.write_text("\n".join(lines))
    line = lines.index("norm=gn:group=2") - 2  # from 1, of the section
    with pytest.raises(UserError, match=rf"toy\.cfg:{line}: norm=gn:group=2: --norm gn has no option 'group'"):
        parse_job(["--data", str(scenes), "--cfg", str(cfg)])


def test_a_norm_of_ones_own_is_trained_resumed_evaluated_and_detected_with(
    root: Path, tmp_path: Path, scenes: Path, cfg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of the documentation, in a folder that is not the project's."""
    docs = (root / "docs" / "norms.md").read_text().partition("## A norm of your own")[2]
    example = re.search(r"```python\n(.*?)```", docs, re.DOTALL)
    assert example is not None and len([line for line in example[1].splitlines() if line]) < 15
    (tmp_path / "my_norms.py").write_text(example[1] + "\n\nopen('imported', 'a').write('x')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def as_a_new_process() -> None:
        monkeypatch.setattr(own, "_trusted", set())
        sys.modules.pop("my_norms", None)
        own._spec_of.cache_clear()

    flags = ["--data", str(scenes), "--cfg", str(cfg), *FLAGS, "--workers", "0"]
    flags += ["--norm", "bn", "--norm-heads", "my_norms.RmsNorm:center"]
    train.main([*flags, "--epochs", "2", "--out", "whole"])
    train.main([*flags, "--epochs", "1", "--out", "halves"])
    assert Checkpoint.from_file(Path("halves/best.pt")).norm["norm_heads"] == "my_norms.RmsNorm:center"
    as_a_new_process()
    image = str(next(scenes.rglob("*.png")))
    pages = [
        (train, ["--resume", "halves", "--epochs", "2"]),
        (evaluate, ["--weights", "whole/best.pt", "--data", str(scenes), "--workers", "0"]),
        (detect, [image, "--weights", "whole/best.pt"]),
    ]
    for page, typed in pages:
        with pytest.raises(UserError, match=r"my_norms\.RmsNorm is not one of this project's.* type --trust my_norms$"):
            page.main(typed)
    assert Path("imported").read_text() == "x", "a checkpoint made us import"
    for page, typed in pages:
        as_a_new_process()
        page.main([*typed, "--trust", "my_norms"])
    assert Path("imported").read_text() == "xxxx"
    assert differing(Path("halves/last.pt"), Path("whole/last.pt")) == []
    as_a_new_process()


def test_a_norm_that_cannot_be_built_leaves_no_folder(tmp_path: Path, scenes: Path, cfg: Path) -> None:
    with pytest.raises(UserError, match=r"torch\.nn\.Conv2d cannot be made for"):
        train.main(
            ["--data", str(scenes), "--cfg", str(cfg), "--norm", "torch.nn.Conv2d", "--out", str(tmp_path / "run")]
        )
    assert not (tmp_path / "run").exists()
