"""What a detector makes of images, and which files it is loaded from."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.detector import Detector
from models.export.load import FilePredictor
from models.export.metadata import Metadata, Suppression
from models.found import Found
from models.stored_network import build_network
from models.weights.writer import write_weights
from models.yolo.postprocess import DetectionOptions
from tests.evaluation.fakes import FakeDetector, Units
from tests.models.checkpoint_file import write_checkpoint
from utils.checkpoint import Checkpoint
from utils.draw import write_png
from utils.errors import UserError
from utils.letterbox import as_input
from utils.structures import Detections

# --- an image, laid into the input and back, of a detector that records what its network is called with


class TwoBoxes(FakeDetector):
    """A box in the middle of the input, and one in its first columns."""

    def detect_batch(self, images: torch.Tensor, units_px: Units = None) -> list[Detections]:
        calls.append((images, units_px))
        boxes = torch.tensor([[32.0, 16, 64, 48], [0, 0, 8, 64]])
        return [Detections(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 0]))]


calls: list[tuple[torch.Tensor, Units]] = []


@pytest.mark.parametrize("resize", ["opencv", "darknet"])
@pytest.mark.parametrize(
    ("letterbox", "unit", "boxes"),
    [
        (False, (96.0, 64.0), [[20, 15, 40, 45], [0, 0, 5, 60]]),
        (True, (64.0, 64.0), [[15, 15, 45, 45]]),  # the other lies wholly in the border
    ],
)
def test_boxes_come_back_in_the_images_pixels(letterbox, unit, boxes, resize) -> None:  # type: ignore[no-untyped-def]
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    calls.clear()
    detector = TwoBoxes(letterbox=letterbox, options=DetectionOptions(resize=resize), hw=(64, 96))
    (found,) = detector.detect([image])
    expected = torch.tensor(boxes, dtype=torch.float32)
    torch.testing.assert_close(found.boxes, expected)
    ((pixels, units_px),) = calls
    assert units_px == [pytest.approx(unit)]
    laid, _ = as_input(image, (64, 96), letterbox=letterbox, how=resize)
    assert pixels.dtype == torch.float32
    expected_pixels = laid if resize == "darknet" else laid.astype(np.float32) / 255
    torch.testing.assert_close(pixels[0].permute(1, 2, 0), torch.from_numpy(expected_pixels))


# --- the door for Python programs

OPTIONS = DetectionOptions(confidence=0.003, max_detections=20)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "best.pt")
    return tmp_path / "best.pt"


@pytest.fixture
def detector(trained: Path) -> Detector:
    return Detector.load(trained, device="cpu", options=OPTIONS)


def image_of(seed: int, hw: tuple[int, int] = (50, 70)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


def check_equal(found: Found, expected: Found) -> None:
    assert len(expected) > 0
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.names == expected.names


FORMS: dict[str, Callable[[Path], object]] = {
    "text": str,
    "path": Path,
    "pillow": Image.open,
    "in a list": lambda path: [path],
    "turned BGR": lambda path: np.array(Image.open(path))[..., ::-1].copy()[..., ::-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_the_same_in_every_form(tmp_path: Path, detector: Detector, form: str) -> None:
    image = image_of(0)
    write_png(tmp_path / "a.png", image)
    found = detector(FORMS[form](tmp_path / "a.png"))
    check_equal(found[0] if isinstance(found, list) else found, detector(image))


def test_boxes_are_those_of_detect_as_numpy(detector: Detector) -> None:
    image = image_of(1)
    found, (expected,) = detector(image), detector.detect([image])
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert found.boxes.dtype == found.scores.dtype == np.float32 and found.labels.dtype == np.int64
    assert found.boxes.min() >= 0 and (found.boxes.max(0) <= (70, 50, 70, 50)).all()
    assert found.names == [detector.class_names[label] for label in found.labels]


def test_max_detections_are_of_the_classes_asked_for(detector: Detector) -> None:
    image = image_of(1)
    everything = detector.with_options(max_detections=None)(image)
    weaker = next(name for name in everything.names if name != everything.names[0])
    (name,) = detector.with_options(max_detections=1)(image, classes=[weaker]).names
    assert name == weaker


def test_a_list_is_answered_in_its_order_whatever_the_sizes(detector: Detector) -> None:
    images = [image_of(seed, hw) for seed, hw in enumerate([(50, 70), (64, 64), (1, 1), (200, 30)])]
    for found, image in zip(detector(images), images, strict=True):
        check_equal(found, detector(image))
    for found, image in zip(detector.detect(images), images, strict=True):  # in one forward
        np.testing.assert_allclose(found.scores, detector(image).scores, atol=1e-5)


def test_threads_find_what_one_finds(detector: Detector) -> None:
    images = [image_of(seed) for seed in range(8)]
    alone = [detector(image) for image in images]
    with ThreadPoolExecutor(4) as threads:
        for found, expected in zip(threads.map(detector, images * 3), alone * 3, strict=True):
            check_equal(found, expected)


def test_a_call_has_settings_of_its_own(detector: Detector) -> None:
    image = image_of(2)
    every = detector(image)
    middle = float(np.median(every.scores))
    sure = detector(image, confidence=middle)
    assert 0 < len(sure) < len(every) and (sure.scores > middle).all()
    check_equal(detector(image, nms_iou=0.1), detector.with_options(nms_iou=0.1)(image))
    dogs, unlimited = detector(image, classes=["dog"]), detector.with_options(max_detections=None)(image)
    np.testing.assert_array_equal(dogs.boxes, unlimited.boxes[unlimited.labels == 1][:20])
    assert set(dogs.names) == {"dog"}
    assert len(detector(image, confidence=1.0)) == 0
    check_equal(detector(image), every)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"confidence": 2}, UserError, "confidence=2 must lie between 0 and 1"),
        ({"nms_iou": float("nan")}, UserError, "nms_iou=nan must lie between 0 and 1"),
        ({"classes": ["dog", "owl"]}, UserError, "the network knows no class 'owl', but person, dog, cat"),
        ({"classes": "dog"}, TypeError, r"classes is a list of names, such as \['dog'\]"),
    ],
)
def test_settings_are_checked(detector: Detector, settings, error, said) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=f"^{said}"):
        detector(image_of(0), **settings)


@pytest.mark.parametrize("images", [[], ()])
def test_no_image_is_refused(detector: Detector, images: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^the list of images is empty$"):
        detector(images)


# --- what it is loaded from


def test_every_kind_of_file_is_the_same_detector(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.pt")
    checkpoint.to_safetensors(tmp_path / "best.safetensors")
    (tmp_path / "toy.cfg").write_text(checkpoint.cfg_text.replace("filters=45", "filters=24").replace("=10", "=3"))
    write_weights(tmp_path / "toy.weights", build_network(checkpoint), seen=1)
    (tmp_path / "toy.names").write_text("person\ndog\ncat\n")
    darknet = {"cfg": str(tmp_path / "toy.cfg"), "names": str(tmp_path / "toy.names")}
    loaded = [
        Detector.load(tmp_path / name, device="cpu", options=OPTIONS, **flags)
        for name, flags in (("best.pt", {}), ("best.safetensors", {}), ("toy.weights", darknet))
    ]
    expected = loaded[0](image_of(3))
    for detector in loaded[1:]:
        check_equal(detector(image_of(3)), expected)
    assert loaded[0].origin == () and "toy.weights" in loaded[2].origin[0]


@pytest.mark.parametrize("norm", ["cmbn", "gn"])
def test_folding_changes_no_more_than_rounding(tmp_path: Path, norm: str) -> None:
    write_checkpoint(tmp_path / "best.pt", norm=norm)
    checkpoint, path = Checkpoint.from_file(tmp_path / "best.pt"), str(tmp_path / "best.pt")
    plain = Detector.from_checkpoint(checkpoint, OPTIONS, path=path, device=torch.device("cpu"))
    folded = Detector.load(path, device="cpu", options=OPTIONS)
    norms = [type(module).__name__ for module in folded.network.modules() if "Norm" in type(module).__name__]
    assert (norm == "gn") == ("GroupNorm" in norms)
    np.testing.assert_allclose(folded(image_of(4)).scores, plain(image_of(4)).scores, atol=1e-6)


def test_people_see_what_detect_py_shows(trained: Path) -> None:
    options = Detector.load(trained, device="cpu").options
    assert (options.confidence, options.nms_iou, options.max_detections) == (0.25, 0.45, 300)


def test_another_input_size(trained: Path) -> None:
    detector = Detector.load(trained, device="cpu", input_hw=(96, 32))
    assert detector.input_hw == (96, 32)
    for wrong in (416, (416,), (0, 416), "416"):
        with pytest.raises(UserError, match=r"^input_hw is .*, not \(height, width\) in pixels, such as \(416, 416\)$"):
            Detector.load(trained, input_hw=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.pt", None, "no such checkpoint or .weights file"),
        ("text.pt", b"PK, but no zip", "not a checkpoint of this project, or damaged"),
        ("some.weights", struct.pack("<3iQ", 0, 2, 0, 7), "name its cfg with --cfg"),
    ],
)
def test_a_file_that_is_no_detector(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*{said}"):
        Detector.load(tmp_path / name)


class Runtime:
    """An exported file, as `models.export` opens it: everything is found in the middle."""

    class_names, letterbox, device, resize = ("cell",), True, torch.device("cpu"), "opencv"
    thresholds = None

    def __init__(self, trained: Path) -> None:
        self.plan = Detector.load(trained, device="cpu").plan

    def check(self, options: DetectionOptions) -> None:
        pass

    def candidates(self, images: Tensor, *, confidence: float) -> list[Detections]:
        box = torch.tensor([[16.0, 16, 48, 48]])
        return [Detections(boxes=box, scores=torch.tensor([0.9]), labels=torch.tensor([0]))] * len(images)


@pytest.mark.parametrize("name", ["net.onnx", "NET.ONNX", "net.xml", "net.torchscript"])
def test_an_exported_file_is_a_detector_without_norms(
    trained: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: dict[str, object] = {}

    def load_exported(path: Path, **settings: object) -> Runtime:
        asked.update(settings, path=path)
        return Runtime(trained)

    monkeypatch.setitem(sys.modules, "models.export.load", SimpleNamespace(load_exported=load_exported))
    detector = Detector.load(name, device="cpu", input_hw=(64, 64), options=OPTIONS)
    assert asked == {"path": Path(name), "device": "cpu", "input_hw": (64, 64)}
    (found,) = detector(np.zeros((64, 128, 3), np.uint8))
    assert (found.name, found.box) == ("cell", (32, 0, 96, 64))
    with pytest.raises(UserError, match=r"^an exported file has no norms, .*: give the checkpoint$"):
        _ = detector.network


@pytest.mark.parametrize("given", ["cfg", "names", "domain"])
def test_an_exported_file_says_itself_what_it_is(given: str) -> None:
    with pytest.raises(UserError, match=r"^net\.onnx: an exported file knows its network and classes: "):
        Detector.load("net.onnx", **{given: "a"})


def test_what_a_graph_has_dropped_is_not_asked_for(trained: Path) -> None:
    own = Detector.load(trained, device="cpu")
    metadata = Metadata(
        cfg_name="toy",
        cfg_text=own.plan.source_text,
        class_names=own.class_names,
        input_hw=own.input_hw,
        letterbox=True,
        resize="opencv",
        norm="bn",
        outputs="nms",
        precision="float32",
        batch=1,
        suppression=Suppression(iou=0.5, confidence=0.1, max_per_class=10),
    )
    file = FilePredictor(Path("net.onnx"), metadata, lambda images: [np.zeros((0, 7), np.float32)], own.plan)
    detector = replace(own, predictor=file)  # it has 0.25 and 0.45
    assert len(detector(image_of(0), confidence=0.1, nms_iou=0.5)) == 0
    for asked in ({"confidence": 0.09}, {"nms_iou": 0.51}):
        with pytest.raises(
            UserError, match=r"^net\.onnx: its graph drops scores below 0\.1 and .* need another export$"
        ):
            detector(image_of(0), **asked)
