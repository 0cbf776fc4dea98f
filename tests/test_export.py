"""export.py from its command line: what is written, what is said, and its exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import export
from cfg.parse import CfgError
from cfg.plan import load_plan
from models.detector import Detector
from models.export.load import load_exported
from models.norms.options import NormOptions
from models.stored_network import make_checkpoint
from options import ExportOptions
from tests.evaluation.fakes import NAMES, known_images
from tests.models.export.networks import trained_network
from utils.errors import UserError

pytest.importorskip("onnxruntime", reason="extra: export")
pytest.importorskip("openvino", reason="extra: export")


def weights(folder: Path, norm: str = "bn") -> str:
    """A checkpoint of yolov4-pico that knows the classes of the known images."""
    plan = load_plan("yolov4-pico", classes=len(NAMES), input_hw=(64, 64))
    network = trained_network(plan, norm)
    options = NormOptions(norm=norm)
    checkpoint = make_checkpoint(plan, options, network.state_dict(), class_names=NAMES, letterbox=True)
    checkpoint.to_file(folder / "best.pt")
    return str(folder / "best.pt")


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr("export.open_image_set", lambda *_, **__: known_images(tmp_path / "images"))


def test_files_are_written_checked_and_load_again(tmp_path, images, capsys):
    argv = ["--weights", weights(tmp_path), "--to", "onnx", "openvino", "--out", str(tmp_path / "out")]
    export.main([*argv, "--check", "known", "--workers", "0"])
    said = capsys.readouterr().out
    assert "AP differs by at most 0.001" in said and "known val: 4 images" in said
    assert sorted(path.name for path in (tmp_path / "out").glob("best*")) == ["best.bin", "best.onnx", "best.xml"]
    for name in ("best.onnx", "best.xml"):
        predictor = load_exported(tmp_path / "out" / name)
        assert predictor.class_names == NAMES and predictor.letterbox and predictor.plan.net.input_hw == (64, 64)


def test_another_ap_than_torchs_is_exit_code_1(tmp_path, images, capsys, monkeypatch):
    monkeypatch.setattr("export.AP_TOLERANCE", {"float32": -1.0})  # so that equal is too far apart
    argv = ["--weights", weights(tmp_path), "--out", str(tmp_path / "out"), "--check", "known", "--workers", "0"]
    with pytest.raises(SystemExit) as caught:
        export.main(argv)
    assert caught.value.code == 1
    assert "best.onnx: AP differs by +0.0000, more than -1" in capsys.readouterr().out


def test_darknets_files_are_what_was_trained_and_an_opencv_that_cannot_check_them_is_told(
    tmp_path, images, capsys, monkeypatch
):
    monkeypatch.delattr("cv2.dnn.readNetFromDarknet", raising=False)
    argv = ["--weights", weights(tmp_path), "--to", "darknet", "--image-size", "96", "--out", str(tmp_path / "out")]
    export.main([*argv, "--check", "known", "--workers", "0"])
    assert "not checked: OpenCV" in capsys.readouterr().out
    written = Detector.load(tmp_path / "out" / "best.weights", cfg=str(tmp_path / "out" / "best.cfg"), device="cpu")
    expected = Detector.load(tmp_path / "best.pt", input_hw=(96, 96), device="cpu")
    assert written.input_hw == (96, 96) and written.letterbox
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    ours, theirs = (each(image, confidence=0.1) for each in (written, expected))
    assert len(ours.boxes) and np.array_equal(ours.boxes, theirs.boxes) and np.array_equal(ours.scores, theirs.scores)


@pytest.mark.parametrize(
    ("norm", "outputs", "line"),
    [
        ("gn:groups=2", "decoded", "GroupNorm stay in the graph"),
        ("bn", "nms", "by IoU alone, the network's [yolo] by"),
    ],
)
def test_what_is_not_as_in_torch_is_said(norm, outputs, line, tmp_path, capsys):
    argv = ["--weights", weights(tmp_path, norm), "--outputs", outputs, "--nms", "greedynms"]
    export.main([*argv, "--out", str(tmp_path / "out")])
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"precision": "int8"}, "go together"),
        ({"calibrate_on": "digits"}, "go together"),
        ({"to": ("torchscript",), "outputs": "nms"}, "torchscript has neither"),
        ({"to": ("onnx", "ncnn"), "precision": "int8", "calibrate_on": "digits"}, "ncnn has neither"),
        ({"to": ("ncnn",), "dynamic": True}, "one image of one size"),
        ({"to": ("darknet",), "outputs": "nms"}, "darknet has neither"),
        ({"to": ("darknet",), "precision": "float16"}, "a .weights file is float32"),
        ({"dynamic": True, "batch_size": 2}, "any number of images"),
        ({"ap_tolerance": 0.1}, "with --check only"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(settings, why):
    with pytest.raises(UserError, match=why):
        ExportOptions(weights="x", **settings)


def test_a_size_that_the_strides_do_not_divide_cannot_be_dynamic(tmp_path):
    argv = ["--weights", weights(tmp_path), "--dynamic", "--image-size", "72", "--out", str(tmp_path / "out")]
    with pytest.raises((UserError, CfgError)):  # the cfg's own, where an upsampled grid meets another one
        export.main(argv)
    assert not (tmp_path / "out").exists()


def test_the_pages_example_runs_without_this_project(root, tmp_path):
    """Somewhere else, by a Python that has onnxruntime and OpenCV."""
    export.main(["--weights", weights(tmp_path), "--out", str(tmp_path / "out")])
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "out" / "street.jpg"), image)
    _, _, code = (root / "docs" / "export.md").read_text().partition("```python\n")
    command = [sys.executable, "-I", "-c", code.partition("```")[0]]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines and all(line.split()[0] in NAMES and 0.25 < float(line.split()[1]) <= 1 for line in lines)
