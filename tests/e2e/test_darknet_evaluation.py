"""`detector map` and `detector valid` of darknet, done again by evaluate.py from the same images and weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from data.annotation_formats import open_image_set
from evaluation.darknet_map import POINTS, measure_as_darknet
from models.detector import Detector
from models.weights.trained import read_trained
from models.yolo.postprocess import DetectionOptions
from tests.conftest import ROOT
from tests.darknet_fixtures import write_weights

EXACT = {"points11_iou0.75": ({"a": 31.82}, 0.106099)}  # darknet's own build takes 3 / 10 for less than 0.3 there


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    folder = ROOT.parent / "shared" / "darknet"
    if not folder.is_dir():
        pytest.skip(f"needs reference files in {folder}")
    return {"folder": folder, **json.loads((folder / "fixtures" / "map" / "map.json").read_text())}


@pytest.fixture(scope="module")
def flags(facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """cfg, weights, names and data set, as paths, by the flags of evaluate.py."""
    folder, fixtures = tmp_path_factory.mktemp("map"), facts["folder"] / "fixtures"
    cfg = (facts["folder"] / "cfg" / "yolov4-tiny.cfg").read_text()
    for key, old, new in (("width", 416, 128), ("height", 416, 96), ("classes", 80, 3), ("filters", 255, 24)):
        cfg = re.sub(rf"^{key}\s*=\s*{old}", f"{key}={new}", cfg, flags=re.MULTILINE)
    (folder / "yolov4-tiny.cfg").write_text(cfg)
    write_weights(fixtures, folder / "yolov4-tiny.cfg", folder / "yolov4-tiny.weights", facts)
    (folder / "abc.names").write_text("a\nb\nc\n")
    images = sorted((fixtures / "map" / "images").glob("*.png"))
    (folder / "images.txt").write_text("".join(f"{path}\n" for path in images))
    (folder / "abc.data").write_text("classes=3\nvalid=images.txt\nnames=abc.names\n")
    return {
        "weights": str(folder / "yolov4-tiny.weights"),
        "cfg": str(folder / "yolov4-tiny.cfg"),
        "names": str(folder / "abc.names"),
        "data": str(folder / "abc.data"),
    }


@pytest.fixture(scope="module")
def detector(flags: dict[str, str]) -> Detector:
    trained, _ = read_trained(flags["weights"], cfg=flags["cfg"], names=flags["names"])
    options = DetectionOptions(resize="darknet")
    return Detector.from_checkpoint(trained, options, path=flags["weights"], device=torch.device("cpu"))


@pytest.mark.parametrize("iou", [0.5, 0.75])
@pytest.mark.parametrize("points", POINTS)
def test_ap_is_darknets(facts: dict[str, Any], flags: dict[str, str], detector: Detector, points: int, iou: float):
    """To the last digit that it prints."""
    images = open_image_set(flags["data"], "val")
    table = measure_as_darknet(detector, images, iou=iou, points=points, batch_size=3, workers=0)
    setting = f"points{points}_iou{iou}"
    printed = "\n".join(facts["darknet_map_output"][setting])
    expected = {name: float(ap) for name, ap in re.findall(r"name = (\w+), ap = ([\d.]+)%", printed)}
    mean = float(re.search(r"mAP@[\d.]+\) = ([\d.]+)", printed)[1])
    correction, mean = EXACT.get(setting, ({}, mean))
    made = {row.name: 100 * row.AP for row in table.classes}
    assert made == pytest.approx(expected | correction, abs=0.005001)
    assert table.mAP == pytest.approx(mean, abs=5.01e-7)
    assert f"detections_count = {sum(row.detections for row in table.classes)}," in printed
    assert f"unique_truth_count = {sum(row.objects for row in table.classes)}" in printed


def test_results_are_darknets(facts: dict[str, Any], flags: dict[str, str], tmp_path: Path, capsys) -> None:
    given = [word for name, value in flags.items() for word in (f"--{name}", value)]
    ways = ["--resize", "darknet", "--metric", "darknet", "--max-detections", "100000", "--workers", "0"]
    evaluate.main([*given, *ways, "--split", "val", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "mAP@0.50 = 20.3, area under the curve, mean of 3 classes" in said
    assert "darknet's AP is not COCO's AP50" in said
    assert (tmp_path / "run" / "darknet_map.txt").read_text() in said

    reference = np.load(facts["folder"] / "fixtures" / "map" / "valid_coco_results.npz")
    columns = [reference[name] for name in ("image_id", "category_id", "score")]
    darknets = np.concatenate([np.stack(columns, axis=1), reference["bbox"]], axis=1)
    rows = json.loads((tmp_path / "run" / "detections.json").read_text())
    made = np.array([[row["image_id"], row["category_id"] + 1, row["score"], *row["bbox"]] for row in rows])
    assert len(made) == len(darknets) == 4031
    for image_id, category_id in np.unique(darknets[:, :2], axis=0):
        ours, theirs = (each[(each[:, :2] == (image_id, category_id)).all(1)][:, 2:] for each in (made, darknets))
        # Raw outputs agree to 3e-5, so scores and boxes of up to 160 px do not to the digits that are written.
        agree = (np.abs(ours[:, None] - theirs) <= (1e-5, 2e-3, 2e-3, 2e-3, 2e-3)).all(2)
        assert (agree.sum(0) == 1).all() and (agree.sum(1) == 1).all()
