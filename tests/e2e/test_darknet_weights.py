"""darknet's .weights through the pages: to start a training, to detect, to evaluate; and what is refused."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import detect
import evaluate
import train
from cfg.parse import CfgError
from cfg.plan import parse_plan
from models.weights.__main__ import main as weights_main
from models.weights.download import PublishedFile
from models.weights.published import PUBLISHED, PublishedWeights
from models.weights.reader import read_weights
from tests.e2e.conftest import TOY_CFG
from tests.reference import darknet_weights as oracle
from utils.checkpoint import Checkpoint
from utils.page import run_page

TOY_OF_THREE = TOY_CFG.replace("filters=45", "filters=24").replace("classes=10", "classes=3")


@pytest.fixture
def flags(scenes: Path) -> list[str]:
    """A step that changes nothing, so that what was loaded can be seen afterwards."""
    still = ["--learning-rate", "1e-12", "--burn-in-steps", "0", "--ema-decay", "0"]
    return ["--data", str(scenes), "--workers", "0", "--evals", "1", *still]


def darknets(folder: Path, text: str, *, layers: int | None = None) -> tuple[str, str]:
    """Paths of a .weights file and its cfg."""
    (folder / "mine.cfg").write_text(text)
    end = 20 + sum(4 * a.size for i, arrays in oracle.layers_of(text) for a in arrays if layers is None or i < layers)
    (folder / "mine.weights").write_bytes(oracle.random_file(text, seen=6400)[:end])
    return str(folder / "mine.weights"), str(folder / "mine.cfg")


def line_of(text: str, start: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line


# --- training -------------------------------------------------------------------------------------------------


def test_training_from_a_partial_file_and_its_resume_without_it(flags, tmp_path, capsys):
    weights, cfg = darknets(tmp_path, TOY_CFG, layers=2)
    run = tmp_path / "run"
    start = ["--weights", weights, "--cfg", cfg, "--norm", "cmbn", "--norm-momentum", "0.001", "--optimizer", "sgd"]
    train.main([*flags, *start, "--epochs", "1", "--out", str(run)])
    assert line_of(capsys.readouterr().out, "weights ") == (
        f"weights   {weights}: loaded 2 of 3 convolutions, 0 bytes left; the file ends before layer 2 [convolutional] "
        f"({cfg}:{TOY_CFG.splitlines().index('filters=45')}): it and all after it are re-initialized"
    )
    loaded = read_weights(Path(weights), parse_plan(TOY_CFG, path="toy.cfg")).state
    network = Checkpoint.from_file(run / "last.pt").training.state["network"]
    for name in ("layers.0.conv.weight", "layers.1.norm.weight", "layers.1.norm.bias"):
        torch.testing.assert_close(network[name], loaded[name], atol=1e-6, rtol=0)
    for name in ("layers.1.norm.running_mean", "layers.1.norm.running_var"):  # moved four times by a thousandth
        torch.testing.assert_close(network[name], loaded[name], atol=0.01, rtol=0.01)
        assert not torch.equal(network[name], loaded[name])

    Path(weights).unlink()
    Path(cfg).unlink()
    train.main(["--resume", str(run), "--epochs", "2", "--workers", "0"])
    assert Checkpoint.from_file(run / "last.pt").step == 8


@pytest.mark.parametrize(("norm", "also"), [("mabn", ""), ("gn", "; this norm has no running m")])
def test_training_for_other_classes_takes_all_but_the_heads(flags, tmp_path, capsys, norm, also):
    weights, cfg = darknets(tmp_path, TOY_OF_THREE)
    start = ["--weights", weights, "--cfg", cfg, "--norm", norm, "--max-steps", "1", "--optimizer", "sgd"]
    train.main([*flags, *start, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert f"          10 classes in the data, 3 in {cfg}: the heads are resized" in said
    assert line_of(said, "weights ").startswith(
        f"weights   {weights}: loaded 3 of 3 convolutions, 0 bytes left; of another size in this network, so "
        f"re-initialized: layers.2.conv{also}"
    )
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["norm"] == norm and settings["weight_centralization"] is False  # as darknet's filters are
    loaded = read_weights(Path(weights), parse_plan(TOY_OF_THREE, path="toy.cfg")).state
    best = Checkpoint.from_file(tmp_path / "run" / "best.pt").weights
    assert torch.allclose(best["layers.1.conv.weight"], loaded["layers.1.conv.weight"], atol=1e-6)
    assert best["layers.2.conv.weight"].shape[0] == 45


def test_all_pages_take_a_published_name(flags, scenes, toy_cfg, tmp_path, monkeypatch, capsys):
    """Here of a file in the cache, so that nothing is downloaded."""
    weights, _ = darknets(tmp_path, TOY_CFG)
    raw = Path(weights).read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = PublishedFile(
        address="https://example.org/toy.weights", sha512=hashlib.sha512(raw).hexdigest(), size_bytes=len(raw)
    )
    monkeypatch.setitem(PUBLISHED, "toy", PublishedWeights(file=file, cfg=toy_cfg))
    file.place.parent.mkdir(parents=True)
    file.place.write_bytes(raw)
    train.main([*flags, "--weights", "toy", "--max-steps", "1", "--out", str(tmp_path / "run")])
    (tmp_path / "digits.names").write_text("".join(f"{digit}\n" for digit in range(10)))
    named = ["--names", str(tmp_path / "digits.names"), "--data", str(scenes), "--workers", "0"]
    evaluate.main(["--weights", "toy", *named, "--out", str(tmp_path / "eval")])
    detect.main(["--weights", "toy", str(scenes / "val"), "--out", str(tmp_path / "detect")])
    assert capsys.readouterr().out.count(f"weights   {file.place}: loaded 3 of 3 convolutions, 0 bytes left") == 3
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["weights"], settings["cfg"]) == (str(file.place), toy_cfg)


# --- detecting and evaluating ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def exported(scenes: Path, toy_cfg: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pt of a short training, and best.weights, best.cfg and best.names made of it."""
    folder = tmp_path_factory.mktemp("exported")
    flags = ["--data", str(scenes), "--cfg", toy_cfg, "--norm", "cmbn", "--epochs", "2", "--workers", "0"]
    train.main([*flags, "--weight-centralization", "--out", str(folder / "run")])
    (folder / "best.pt").write_bytes((folder / "run" / "best.pt").read_bytes())
    weights_main(["convert", str(folder / "best.pt"), str(folder / "best.weights")])
    return folder


def test_the_same_is_found_with_darknets_files(exported, scenes, tmp_path, capsys):
    best = exported / "best"
    darknet = ["--weights", f"{best}.weights", "--cfg", f"{best}.cfg", "--names", f"{best}.names"]
    found = {}
    for name, given in (("ours", ["--weights", f"{best}.pt"]), ("darknet", darknet)):
        capsys.readouterr()
        run = tmp_path / name
        detect.main([*given, str(scenes / "val"), "--confidence", "0.002", "--save-json", "--out", str(run)])
        found[name] = json.loads((run / "detections.json").read_text())
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        f"weights   {best}.weights: loaded 3 of 3 convolutions, 0 bytes left",
        f"names     from {best}.names",
    ]
    assert sum(len(row["objects"]) for row in found["ours"]) > 20
    for ours, theirs in zip(found["ours"], found["darknet"], strict=True):
        assert [thing["class"] for thing in ours["objects"]] == [thing["class"] for thing in theirs["objects"]]
        for mine, other in zip(ours["objects"], theirs["objects"], strict=True):
            assert other["score"] == pytest.approx(mine["score"], abs=1e-5)
            assert other["bbox"] == pytest.approx(mine["bbox"], abs=0.01)


def test_the_same_is_measured_and_recalibrated(exported, scenes, tmp_path, capsys):
    best = exported / "best"
    darknet = ["--weights", f"{best}.weights", "--cfg", f"{best}.cfg", "--names", f"{best}.names"]
    table = {}
    for name, given in (("ours", ["--weights", f"{best}.pt"]), ("darknet", darknet)):
        evaluate.main([*given, "--data", str(scenes), "--workers", "0", "--out", str(tmp_path / name)])
        table[name] = dict(list(json.loads((tmp_path / name / "metrics.json").read_text()).items())[:12])
    assert table["ours"] == pytest.approx(table["darknet"], abs=1e-3)
    assert f"names     from {best}.names\n" in capsys.readouterr().out
    more = [
        "--recalibrate-on",
        str(scenes),
        "--recalibrate-images",
        "4",
        "--norm-report",
        "--out",
        str(tmp_path / "more"),
    ]
    evaluate.main([*darknet, "--data", str(scenes), "--workers", "0", *more])
    text = (tmp_path / "more" / "norm_report.txt").read_text()
    assert "trained with bn: mini-batches of 2 images" in text
    weights_main(["convert", str(tmp_path / "more" / "recalibrated.pt"), str(tmp_path / "again.weights")])
    seen = [(folder.read_bytes())[:20] for folder in (tmp_path / "again.weights", Path(f"{best}.weights"))]
    assert seen[0] == seen[1] == oracle.header(8 * 4)  # two epochs of four steps of four images


# --- bad input: one sentence, exit code 2 ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "given", "sentence"),
    [
        (detect, ["--weights", "mine.weights"], "mine.weights: darknet's weights do not describe their network"),
        (evaluate, ["--weights", "mine.weights"], "name its cfg with --cfg"),
        (train, ["--weights", "mine.weights"], "name its cfg with --cfg"),
        (
            detect,
            ["--weights", "best.pt", "--cfg", "mine.cfg"],
            "best.pt: a checkpoint knows its network and its classes",
        ),
        (evaluate, ["--weights", "best.pt", "--names", "two.names"], "leave --cfg and --names out"),
        (detect, ["--weights", "mine.weights", "--cfg", "mine.cfg", "--names", "two.names"], "two.names: has 2 names"),
        (detect, ["--weights", "part.weights", "--cfg", "mine.cfg"], "part.weights: is not the whole network"),
        (evaluate, ["--weights", "part.weights", "--cfg", "mine.cfg"], "only train.py can use it"),
        (
            train,
            ["--weights", "cut.weights", "--cfg", "mine.cfg"],
            "cut.weights: it ends inside layer 0 [convolutional] (",
        ),
        (train, ["--weights", "mine.weights", "--cfg", "yolov4-pico"], "mine.weights: it ends inside layer "),
        (
            detect,
            ["--weights", "mine.cfg"],
            "mine.cfg: neither a checkpoint of this project nor a darknet .weights file",
        ),
        (
            train,
            ["--weights", "gone.weights", "--cfg", "mine.cfg"],
            "gone.weights: no such checkpoint or .weights file",
        ),
    ],
)
def test_refusals(page, given, sentence, exported, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights, _ = darknets(tmp_path, TOY_CFG)
    raw = Path(weights).read_bytes()
    (tmp_path / "part.weights").write_bytes(raw[: 20 + 4 * (4 * 8 + 8 * 27)])
    (tmp_path / "cut.weights").write_bytes(raw[:500])
    (tmp_path / "two.names").write_text("a\nb\n")
    (tmp_path / "best.pt").write_bytes((exported / "best.pt").read_bytes())
    data = [str(scenes / "val")] if page is detect else ["--data", str(scenes), "--workers", "0"]
    monkeypatch.setattr(sys, "argv", [f"{page.__name__}.py", *data, *given, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        run_page(page.main, CfgError)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
