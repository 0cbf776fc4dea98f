"""Which confidence a detector has: the file's by class, one for all, or that of earlier files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import detect
import export
from models.detector import Detector
from models.thresholds import Threshold, Thresholds
from models.yolo.postprocess import DrawnDetectionOptions
from tests.models.checkpoint_file import write_checkpoint
from utils.draw import write_png
from utils.errors import UserError

NAMES = ("person", "dog", "cat")


def threshold(confidence: float) -> Threshold:
    return Threshold(confidence=confidence, precision=0.5, recall=1, f1=2 / 3)


THRESHOLDS = Thresholds(common=threshold(0.0053), classes={"person": threshold(0.0052), "cat": threshold(0.0056)})
LOWEST = np.array([0.0052, 0.0053, 0.0056])


@pytest.fixture
def trained(tmp_path: Path) -> str:
    checkpoint = replace(write_checkpoint(tmp_path / "best.pt"), thresholds=THRESHOLDS.to_json())
    checkpoint.to_file(tmp_path / "best.pt")
    checkpoint.to_safetensors(tmp_path / "best.safetensors")
    return str(tmp_path / "best.pt")


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def kept_by_class(detector: Detector, image: np.ndarray) -> np.ndarray:
    """Scores that may be there, of what suppression leaves without thresholds."""
    everything = detector(image, confidence=0.003)
    return np.asarray(everything.scores[everything.scores > LOWEST[everything.labels]])


def test_a_file_gives_each_class_its_confidence(trained: str, image: np.ndarray) -> None:
    for path in (trained, trained.replace(".pt", ".safetensors")):
        detector = Detector.load(path, device="cpu")
        found = detector(image)
        assert {0, 1, 2} == set(found.labels.tolist())
        np.testing.assert_allclose(found.scores, kept_by_class(detector, image))
        assert detector.confidences.tolist() == pytest.approx(LOWEST.tolist())
        (said,) = detector.origin
        assert "above 0.005 (person 0.005, dog 0.005, cat 0.006), the best by F1" in said


@pytest.mark.parametrize("how", ["call", "options", "load"])
def test_a_confidence_for_all_overrides_it(trained: str, image: np.ndarray, how: str) -> None:
    options = DrawnDetectionOptions(confidence=0.0054)
    if how == "load":
        found = Detector.load(trained, device="cpu", options=options)(image)
    elif how == "options":
        found = Detector.load(trained, device="cpu").with_options(confidence=0.0054)(image)
    else:
        found = Detector.load(trained, device="cpu")(image, confidence=0.0054)
    everything = Detector.load(trained, device="cpu")(image, confidence=0.003)
    np.testing.assert_allclose(found.scores, everything.scores[everything.scores > 0.0054])


def test_other_options_leave_it(trained: str) -> None:
    detector = Detector.load(trained, device="cpu").with_options(nms_iou=0.3)
    assert detector.thresholds == THRESHOLDS


def test_a_file_of_an_earlier_version_has_a_quarter(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "best.pt")
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    del content["thresholds"]
    torch.save(content, tmp_path / "old.pt")
    detector = Detector.load(tmp_path / "old.pt", device="cpu")
    assert detector.thresholds is None and detector.confidences.tolist() == [0.25] * 3


@pytest.mark.parametrize(
    "changed",
    [
        {"confidence": math.nan},
        {"confidence": 1.5},
        {"confidence": True},
        {"f1": "high"},
        {"classes": None},
        {"classes": {"dog": 0.3}},
        {"classes": {"dog": {"confidence": 0.3}}},
    ],
    ids=str,
)
def test_damaged_thresholds_are_the_users_error(trained: str, changed: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Thresholds.from_json({**THRESHOLDS.to_json(), **changed})
    checkpoint = replace(write_checkpoint(Path(trained)), thresholds={**THRESHOLDS.to_json(), **changed})
    checkpoint.to_file(Path(trained))
    with pytest.raises(UserError, match=r"best\.pt: its thresholds cannot be used \(.*\): give --confidence$"):
        Detector.load(trained, device="cpu")
    assert Detector.load(trained, device="cpu", options=DrawnDetectionOptions()).thresholds is None


def test_they_survive_json() -> None:
    assert Thresholds.from_json(json.loads(json.dumps(THRESHOLDS.to_json()))) == THRESHOLDS


def test_an_exported_file_has_them(tmp_path: Path, trained: str, image: np.ndarray) -> None:
    export.main(["--weights", trained, "--to", "torchscript", "--out", str(tmp_path / "exported")])
    (file,) = (tmp_path / "exported").glob("*.torchscript")
    exported, own = Detector.load(file), Detector.load(trained, device="cpu", precision="float32")
    assert exported.thresholds == own.thresholds == THRESHOLDS
    np.testing.assert_allclose(exported(image).scores, own(image).scores, atol=1e-6)


def test_a_graph_that_drops_more_has_none(tmp_path: Path, trained: str) -> None:
    checkpoint_flags = ["--weights", trained, "--to", "onnx", "--outputs", "nms"]
    for confidence, expected in (("0.001", THRESHOLDS), ("0.0053", None)):
        folder = tmp_path / confidence
        export.main([*checkpoint_flags, "--confidence", confidence, "--nms-iou", "0.45", "--out", str(folder)])
        detector = Detector.load(next(folder.glob("*.onnx")))
        assert detector.thresholds == expected


def test_detect_py_takes_them_unless_told_otherwise(tmp_path: Path, trained: str, image: np.ndarray, capsys) -> None:  # type: ignore[no-untyped-def]
    write_png(tmp_path / "image.png", image)

    def scores(*flags: str) -> list[float]:
        out = tmp_path / "-".join(["out", *flags])
        common = ["--weights", trained, str(tmp_path / "image.png"), "--save-json", "--device", "cpu"]
        detect.main([*common, "--precision", "float32", "--out", str(out), *flags])
        (row,) = json.loads((out / "detections.json").read_text())
        return [each["score"] for each in row["objects"]]

    own = Detector.load(trained, device="cpu", precision="float32")
    assert scores() == pytest.approx(own(image).scores.tolist(), abs=2e-6)
    assert "above 0.005 (person 0.005" in capsys.readouterr().out
    assert scores("--confidence", "0.0054") == pytest.approx(own(image, confidence=0.0054).scores.tolist(), abs=2e-6)
    assert "person 0.005" not in capsys.readouterr().out
