"""What evaluate.py prints and refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import export
from cfg.plan import parse_plan
from data.annotation_formats import open_image_set
from evaluation.darknet_map import measure_as_darknet
from models.detector import Detector
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.stored_network import make_checkpoint
from models.weights.writer import write_weights
from models.yolo.postprocess import DetectionOptions
from options import EvaluateOptions
from tests.data.sets import CLASSES, write_darknet
from tests.e2e.conftest import TOY_CFG
from tests.evaluation.fakes import known_images
from tests.toy_checkpoint import toy_checkpoint
from utils.checkpoint import Checkpoint
from utils.errors import UserError


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of the time of a small evaluation."""
    for name in ("plot_pr_curves", "plot_confusion"):
        monkeypatch.setattr(f"evaluation.evaluator.{name}", lambda *_: None)


def test_evaluate_suppresses_as_the_trainer_does() -> None:
    assert EvaluateOptions(weights="best.pt").detection == DetectionOptions()


OFFICIAL = {"cfg_name": "yolov4", "class_names": tuple(map(str, range(80))), "seen": 32_000_000}


@pytest.mark.parametrize(
    ("fields", "name", "coco_json", "folder", "expected"),
    [
        ({}, "coco", "/coco/annotations/instances_val2017.json", "images", True),
        ({}, "coco", None, "val2017", True),
        ({"cfg_name": "my-yolov4-tiny"}, "val2017", None, "images", True),
        ({}, "coco", "/coco/annotations/instances_val2014.json", "val2014", False),
        ({"class_names": ("a",)}, "val2017", None, "images", False),
        ({"cfg_name": "yolov3"}, "val2017", None, "images", False),
        ({"seen": None}, "val2017", None, "images", False),
    ],
)
def test_official_weights_on_val2017_are_warned_of(tmp_path: Path, fields, name, coco_json, folder, expected, capsys):
    images = replace(known_images(tmp_path / folder), name=name, coco_json=coco_json)
    evaluate.announce(toy_checkpoint(**{**OFFICIAL, **fields}), (), images)
    assert ("trained on a part of val2017" in capsys.readouterr().out) == expected


def official_weights(folder: Path, cfg_name: str) -> list[str]:
    """Flags for weights of a network of 80 classes: cat, dog, owl and others."""
    text = TOY_CFG.replace("filters=45", "filters=255").replace("classes=10", "classes=80")
    (folder / f"{cfg_name}.cfg").write_text(text)
    network = Network(parse_plan(text, path=f"{cfg_name}.cfg"), norm_factory(NormOptions(norm="bn")))
    write_weights(folder / "official.weights", network, seen=32_000_000)
    (folder / "eighty.names").write_text("\n".join([*CLASSES, *(f"class {number}" for number in range(77))]))
    flags = {"weights": "official.weights", "cfg": f"{cfg_name}.cfg", "names": "eighty.names"}
    return [word for name, file in flags.items() for word in (f"--{name}", str(folder / file))]


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    ("cfg_name", "folder", "warned"),
    [("yolov4-x", "val2017", True), ("yolov4-x", "test", False), ("v4", "val2017", False)],
)
def test_evaluate_warns_of_them(  # type: ignore[no-untyped-def]
    tmp_path: Path, capsys, cfg_name: str, folder: str, warned: bool
) -> None:
    data = write_darknet(tmp_path / folder, "val")
    where = ["--data", str(data), "--out", str(tmp_path / "run"), "--workers", "0", "--device", "cpu"]
    evaluate.main([*official_weights(tmp_path, cfg_name), *where])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == warned
    assert all("trained on a part of val2017" in line for line in said)


@pytest.fixture
def trained(tmp_path: Path) -> str:
    plan = parse_plan(TOY_CFG, path="toy.cfg", classes=3)
    norm = NormOptions(norm="bn")
    network = Network(plan, norm_factory(norm))
    weights = network.state_dict()
    make_checkpoint(plan, norm, weights, class_names=tuple(CLASSES), letterbox=True).to_file(tmp_path / "toy.pt")
    return str(tmp_path / "toy.pt")


@pytest.mark.usefixtures("without_plots")
def test_darknets_metric_stands_beside_cocos(tmp_path: Path, trained: str, capsys) -> None:  # type: ignore[no-untyped-def]
    data = str(write_darknet(tmp_path / "data", "val"))
    common = ["--weights", trained, "--data", data, "--workers", "0", "--device", "cpu", "--confidence", "0.0001"]
    common += ["--resize", "darknet", "--nms", "diounms"]
    evaluate.main([*common, "--out", str(tmp_path / "coco")])
    capsys.readouterr()
    metric = ["--metric", "darknet", "--map-points", "11", "--map-iou", "0.2"]
    evaluate.main([*common, *metric, "--out", str(tmp_path / "both")])
    alone, beside = ((tmp_path / name / "detections.json").read_text() for name in ("coco", "both"))
    assert alone == beside
    said = capsys.readouterr().out
    assert "Average Precision  (AP) @[ IoU=0.50:0.95" in said
    assert re.search(r"^mAP@0\.20 = \d+\.\d, 11 recall points, mean of 3 classes$", said, re.MULTILINE)
    assert said.count("darknet's AP is not COCO's AP50: ") == 1
    checkpoint = Checkpoint.from_file(Path(trained))
    options = DetectionOptions(confidence=0.5, nms_iou=0.9, max_detections=3, nms="diounms", resize="darknet")
    detector = Detector.from_checkpoint(checkpoint, options, path=trained, device=torch.device("cpu"))
    table = measure_as_darknet(detector, open_image_set(data, "val"), iou=0.2, points=11, batch_size=16, workers=0)
    assert table.summary() in said
    assert np.isclose(table.mAP, np.mean([row.AP for row in table.classes]))


@pytest.mark.parametrize("flags", [["--map-points", "11"], ["--map-iou", "0.7", "--metric", "coco"]])
def test_darknets_flags_need_its_metric(tmp_path: Path, trained: str, flags: list[str]) -> None:
    with pytest.raises(UserError, match=f"^{flags[0]} is read with --metric darknet only$"):
        evaluate.main(["--weights", trained, "--out", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()


@pytest.fixture
def exported(tmp_path: Path, trained: str) -> str:
    export.main(["--weights", trained, "--to", "torchscript", "--out", str(tmp_path / "exported")])
    (file,) = (tmp_path / "exported").glob("*.torchscript")
    return str(file)


@pytest.mark.usefixtures("without_plots")
def test_an_exported_file_is_evaluated_as_its_checkpoint(tmp_path: Path, trained: str, exported: str) -> None:
    data = str(write_darknet(tmp_path / "data", "val"))
    found = []
    for name, weights in (("own", trained), ("of file", exported)):
        flags = ["--weights", weights, "--data", data, "--workers", "0", "--device", "cpu", "--metric", "darknet"]
        evaluate.main([*flags, "--out", str(tmp_path / name)])
        found.append(json.loads((tmp_path / name / "detections.json").read_text()))
    own, others = (sorted((row["image_id"], sum(row["bbox"]), row["score"]) for row in rows) for rows in found)
    assert len(own) > 0
    np.testing.assert_allclose(own, others, atol=1e-2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--norm-report"],
            "an exported file has no norms, they are folded into its convolutions: give the checkpoint",
        ),
        (["--recalibrate-on", "digits"], "an exported file has no norms, .*: give the checkpoint"),
        (["--norm-stats", "batch"], "an exported file has no norms, .*: give the checkpoint"),
        (["--image-size", "96"], r".*toy\.torchscript: takes 64x64 pixels only; .*"),
        (["--cfg", "yolov4"], r".*toy\.torchscript: an exported file knows its network and classes: .*"),
        (["--domain", "a"], r".*toy\.torchscript: an exported file knows its network and classes: .*"),
    ],
)
def test_what_needs_the_checkpoint_is_refused(tmp_path: Path, exported: str, flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}$"):
        evaluate.main(["--weights", exported, "--out", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_plots")
def test_two_files_are_compared_and_their_folders_again(tmp_path: Path, trained: str, exported: str, capsys) -> None:  # type: ignore[no-untyped-def]
    data = str(write_darknet(tmp_path / "data", "val"))
    common = ["--data", data, "--workers", "0", "--device", "cpu"]
    evaluate.main(["--compare", trained, trained, *common, "--out", str(tmp_path / "same")])
    assert "no difference shown between A and B: +0.0 [0.0, 0.0], p = 1" in capsys.readouterr().out
    found = json.loads((tmp_path / "same" / "comparison.json").read_text())
    assert found["difference"] == {"value": 0, "interval": [0, 0], "p": 1}
    assert (found["files"], found["images"]) == ([trained, trained], 3)
    folder = str(tmp_path / "same" / "A")
    evaluate.main(["--compare", folder, exported, *common, "--out", str(tmp_path / "other")])
    assert re.search(
        rf"^A         {re.escape(folder)}: AP \d+\.\d  AP50 \d+\.\d$", capsys.readouterr().out, re.MULTILINE
    )
    assert json.loads((tmp_path / "other" / "comparison.json").read_text())["A"] == found["A"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "name what to evaluate: --weights FILE, or two with --compare A B"),
        (["--compare", "a.pt"], "name what to evaluate: .*"),
        (["--compare", "a.pt", "b.pt", "--weights", "c.pt"], "name what to evaluate: .*"),
        (["--compare", "a.pt", "b.pt", "--norm-report"], "--norm-report, .* are of one file: --weights FILE"),
        (["--compare", "a.pt", "b.pt", "--metric", "darknet"], ".* and --metric darknet are of one file: .*"),
    ],
)
def test_what_is_compared_must_be_clear(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}$"):
        evaluate.main(flags)
