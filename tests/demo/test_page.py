"""The page without a browser: what its function returns, and what ends it with a sentence."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.__main__ import DemoOptions, main
from models.detector import Detector
from models.yolo.postprocess import DrawnDetectionOptions
from tests.models.checkpoint_file import write_checkpoint
from utils.errors import UserError

gr = pytest.importorskip("gradio", reason="pip install -e .[demo]")
from demo import page  # noqa: E402

LITTLE = DrawnDetectionOptions(confidence=0.003)


@pytest.fixture(autouse=True)
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `main` changes is put back."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two networks with different classes."""
    first, second = (tmp_path_factory.mktemp(name) / "best.pt" for name in ("a", "b"))
    write_checkpoint(first)
    write_checkpoint(second, class_names=("cat", "bird"))
    return str(first), str(second)


@pytest.fixture
def image(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    return str(tmp_path / "street.png")


def the_function(*detectors: tuple[str, Detector]):
    """What the page calls whenever something on it is changed."""
    made = page.make_page(detectors)
    (event,) = made.fns.values()
    assert len(event.targets) == 4 and len(event.outputs) == 2 * len(detectors)
    return event.fn


def test_it_finds_what_the_detector_finds(files, image):
    detector = Detector.load(files[0], device="cpu", options=LITTLE)
    show = the_function((files[0], detector))
    for confidence, nms_iou in ((0.003, 0.45), (0.004, 0.9), (1.0, 0.45)):
        counts, drawn = show(image, confidence, nms_iou, [])
        found = detector(image, confidence=confidence, nms_iou=nms_iou)
        assert (counts == "nothing") == (confidence == 1.0) == (len(found) == 0)
        assert sum(int(each.split()[0]) for each in counts.split(", ") if each != "nothing") == len(found)
        np.testing.assert_array_equal(drawn, found.plot())
    assert show(None, 0.003, 0.45, []) == ["", None]


def test_classes_are_those_of_both_networks(files, image):
    detectors = [(file, Detector.load(file, device="cpu", options=LITTLE)) for file in files]
    made = page.make_page(detectors)
    (classes,) = (block for block in made.blocks.values() if isinstance(block, gr.Dropdown))
    assert [name for name, _ in classes.choices] == ["person", "dog", "cat", "bird"]
    first, first_drawn, second, second_drawn = the_function(*detectors)(image, 0.003, 0.45, ["bird"])
    assert first == "nothing" and second.endswith(" bird")
    np.testing.assert_array_equal(first_drawn, np.asarray(Image.open(image)))
    np.testing.assert_array_equal(second_drawn, detectors[1][1](image, classes=["bird"]).plot())


def test_what_is_no_image_is_said_by_its_name_alone(files, tmp_path):
    (tmp_path / "x.svg").write_text("<svg/>")
    show = the_function((files[0], Detector.load(files[0], device="cpu")))
    with pytest.raises(gr.Error, match=r"^'x\.svg: cannot be read as an image'$"):
        show(str(tmp_path / "x.svg"), 0.25, 0.45, [])


def test_it_starts_at_the_thresholds_of_the_command_line(files):
    made = page.make_page([(files[0], Detector.load(files[0], device="cpu", options=LITTLE))])
    sliders = [block for block in made.blocks.values() if isinstance(block, gr.Slider)]
    assert [(each.minimum, each.value) for each in sliders] == [(0.003, 0.003), (0, 0.45)]


def test_darknets_files_may_share_a_cfg(monkeypatch):
    asked: list[tuple[str, str | None, str | None]] = []
    monkeypatch.setattr(Detector, "load", lambda file, *, cfg, names, **_: asked.append((file, cfg, names)))
    darknet = {"weights": "a.weights", "cfg": "a.cfg", "names": "a.names"}
    for more in (
        {},
        {"compare": "b.weights"},
        {"compare": "best.pt"},
        {"compare": "b.weights", "compare_cfg": "b.cfg"},
    ):
        DemoOptions(**darknet, **more).load_all()
    first = ("a.weights", "a.cfg", "a.names")
    assert asked == [
        *(first,),
        *(first, ("b.weights", "a.cfg", "a.names")),
        *(first, ("best.pt", None, None)),
        *(first, ("b.weights", "b.cfg", "a.names")),
    ]


def test_without_gradio_it_says_what_to_install(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "demo.page", raising=False)
    with pytest.raises(UserError, match=r"needs gradio .*pip install"):
        main(["--weights", files[0]])


def test_a_taken_port_is_said(files):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*choose another"):
            main(["--weights", files[0], "--device", "cpu", "--port", str(port)])
