"""A detector that knows the answers meets a data set; and what evaluate.py says where weights and data do not fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from cfg.plan import parse_plan
from data.image_set import ImageSet
from data.source import open_image_set
from engine import build
from evaluation.build import make_evaluator, may_have_trained_on, measure_as_darknet, places_of, sample_images
from models.detector import detector_of, make_checkpoint
from models.network import Network
from models.norms.table import NormOptions, norm_factory
from models.weights.writer import write_weights
from options import EvaluateOptions, TrainOptions
from tests.data.sets import CLASSES, noise_image_set, write_darknet
from tests.e2e.conftest import TOY_CFG
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.structures import Detections

LOADING = {"batch_size": 2, "workers": 0}
asked: list[tuple] = []


@dataclass(frozen=True, kw_only=True)
class Knowing:
    """Finds every object of noise_image_set, and a cat in each corner, in the order of the images. Its classes are in
    an order of their own, and there is one more."""

    class_names: tuple[str, ...] = ("emu", "owl", "dog", "cat")
    input_hw: tuple[int, int] = (120, 240)
    size_step_px: int = 32
    letterbox: bool = False
    resize: str = "opencv"
    device: str = "cpu"
    confidence: float = 0.1
    nms_iou: float = 0.6
    max_detections: int | None = 100

    def __call__(self, images: torch.Tensor, units_px: Sequence[tuple[float, float]]) -> list[Detections]:
        found = []
        for _, unit in zip(images, units_px, strict=True):
            objects = torch.tensor([[30.0, 20, 120, 80], [90, 10, 210, 100]])[: len(asked) % 3]
            asked.append((unit, self.confidence, self.nms_iou, self.max_detections))
            boxes = torch.cat((objects, torch.tensor([[0.0, 0, 10, 10]])))
            scores, labels = torch.linspace(0.9, 0.8, len(boxes)), torch.tensor([3, 2])[: len(objects)]
            found.append(Detections(boxes=boxes, scores=scores, labels=torch.cat((labels, torch.tensor([3])))))
        return found


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of the time of a small evaluation."""
    for name in ("plot_pr_curves", "plot_confusion"):
        monkeypatch.setattr(f"evaluation.evaluator.{name}", lambda *_: None)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    asked.clear()
    return noise_image_set(tmp_path / "images", 5)


def test_measuring_as_darknet(images: ImageSet) -> None:
    """Three cats, all found; of the eight said to be cats the wrong ones score less. One dog, found. No owl or emu."""
    table = measure_as_darknet(Knowing(), images, iou=0.5, points=0, **LOADING)  # type: ignore[arg-type]
    assert {(row.name, row.truths, row.detections) for row in table.classes} == {
        ("emu", 0, 0),
        ("owl", 0, 0),
        ("dog", 1, 1),
        ("cat", 3, 8),
    }
    of = {row.name: row.AP for row in table.classes}
    assert (of["emu"], of["owl"], of["dog"]) == (0, 0, 1)
    assert 0.4 < of["cat"] < 1
    # With darknet's thresholds, whatever the detector's own, and in shares of the image's sides.
    assert asked == [((240.0, 120.0), 0.005, 0.45, None)] * 5


def test_coco_takes_the_detector_as_it_is_and_source_pixels(images: ImageSet) -> None:
    assert make_evaluator(Knowing(), images, **LOADING).measure().AP50 > 0.4  # type: ignore[arg-type]
    best = make_evaluator(Knowing(max_detections=1), images, **LOADING)  # type: ignore[arg-type]
    assert len(best.results()) == 5
    # The detector is asked for all; the best are chosen of those the data set knows.
    assert asked == [((3.0, 2.0), 0.1, 0.6, None)] * 10


def test_classes_must_fit(images: ImageSet) -> None:
    stranger = replace(Knowing(), class_names=("emu", "cow", "dog", "cat"))
    with pytest.raises(UserError, match="not trained on: owl"):
        measure_as_darknet(stranger, images, iou=0.5, points=0, **LOADING)  # type: ignore[arg-type]


def test_images_are_resized_as_the_detector_wants(images: ImageSet) -> None:
    (as_bytes, *_), (as_floats, *_) = (
        sample_images(images, replace(Knowing(), resize=how), image_count=2, **LOADING)  # type: ignore[arg-type]
        for how in ("opencv", "darknet")
    )
    assert (as_bytes.dtype, as_floats.dtype) == (torch.uint8, torch.float32)
    assert as_bytes.shape == as_floats.shape == (2, 3, 120, 240)
    difference = (as_floats - as_bytes / 255).abs()
    assert 0.001 < difference.mean() < 0.2


def test_the_trainer_suppresses_as_evaluate_does() -> None:
    detector = build.make_detector(TrainOptions(), None, CLASSES)  # type: ignore[arg-type]
    default = EvaluateOptions(weights="")
    for rule in ("nms", "resize", "nms_iou", "confidence", "max_detections"):
        assert getattr(detector, rule) == getattr(default, rule)


# --- weights that know the images ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg_name", "classes", "places", "expected"),
    [
        ("yolov4", 80, ("coco", "/coco/annotations/instances_val2017.json", "/coco/val2017"), True),
        ("yolov4-tiny", 80, ("val2017", "", "/images"), True),
        ("my-yolov4", 80, ("val2017", "", "/images"), True),
        ("yolov4", 80, ("coco", "/coco/annotations/instances_val2014.json", "/coco/val2014"), False),
        ("yolov4", 20, ("coco", "", "/coco/val2017"), False),
        ("yolov3", 80, ("coco", "", "/coco/val2017"), False),
        ("yolov4", 80, (), False),
    ],
)
def test_official_weights_know_a_part_of_val2017(cfg_name, classes, places, expected) -> None:  # type: ignore[no-untyped-def]
    assert may_have_trained_on(cfg_name, classes, places) is expected


def test_places_of_a_data_set(tmp_path: Path) -> None:
    image_set = open_image_set(write_darknet(tmp_path / "val2017", "val"), "val")
    assert places_of(image_set) == ("set", "", str(tmp_path / "val2017" / "images"))


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


# --- evaluate.py -------------------------------------------------------------------------------------------------


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
    assert re.search(r"^mAP@0\.20 = 0\.\d{4}, 11 recall points, mean of 3 classes$", said, re.MULTILINE)
    assert said.count("darknet's AP is not COCO's AP50: ") == 1
    checkpoint = Checkpoint.from_file(Path(trained))
    rules = {"confidence": 0.5, "nms_iou": 0.9, "max_detections": 3, "nms": "diounms", "resize": "darknet"}
    detector = detector_of(checkpoint, path=trained, device=torch.device("cpu"), **rules)
    table = measure_as_darknet(detector, open_image_set(data, "val"), iou=0.2, points=11, batch_size=16, workers=0)
    assert table.summary() in said
    assert np.isclose(table.mAP, np.mean([row.AP for row in table.classes]))


@pytest.mark.parametrize("flags", [["--map-points", "11"], ["--map-iou", "0.7", "--metric", "coco"]])
def test_darknets_flags_need_its_metric(tmp_path: Path, trained: str, flags: list[str]) -> None:
    with pytest.raises(UserError, match=f"^{flags[0]} is read with --metric darknet only$"):
        evaluate.main(["--weights", trained, "--out", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()
