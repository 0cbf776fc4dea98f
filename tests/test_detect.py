"""detect.py from its command line to its files, with a detector that finds the red squares."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import detect
from data.annotation_formats import open_image_set
from models.yolo.postprocess import DetectionOptions
from tests.data.test_inference_sources import write_video
from tests.data.web_server import serve
from utils.draw import write_png
from utils.errors import UserError
from utils.structures import Detections


@dataclass(frozen=True, kw_only=True)
class RedSquares:
    """Finds connected red regions as "square", with a score of 0.9; `seen` has the sizes of the images it saw."""

    seen: list[tuple[int, ...]]
    on_image: Any = None
    confidence: float = 0.25
    max_detections: int | None = 300
    class_names: tuple[str, ...] = ("other", "square")
    origin: tuple[str, ...] = ()
    images_per_forward: int = 2

    @property
    def confidences(self) -> torch.Tensor:
        return torch.full((2,), self.confidence)

    @property
    def options(self) -> DetectionOptions:
        return DetectionOptions(confidence=self.confidence)

    def with_options(self, **changed: Any) -> RedSquares:
        return replace(self, **changed)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        return [self._one(image) for image in images]

    def _one(self, image: np.ndarray) -> Detections:
        self.seen.append(image.shape[:2])
        if self.on_image is not None:
            self.on_image(len(self.seen))
        mask = ((image[..., 0] > 150) & (image[..., 1] < 100)).astype(np.uint8)
        rows = cv2.connectedComponentsWithStats(mask)[2][1:, :4].astype(np.float32)
        boxes = torch.from_numpy(np.column_stack((rows[:, :2], rows[:, :2] + rows[:, 2:])))
        return Detections(boxes=boxes, scores=torch.full((len(rows),), 0.9), labels=torch.ones(len(rows)).long())


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> RedSquares:
    squares = RedSquares(seen=[])
    monkeypatch.setattr(detect.Detector, "load", lambda *_, **__: squares)
    return squares


def run(tmp_path: Path, *arguments: object) -> list[dict[str, Any]]:
    """Run detect.py into tmp_path/out; returns what it wrote as json."""
    detect.main(["--weights", "x.pt", "--out", str(tmp_path / "out"), "--save-json", *map(str, arguments)])
    return rows_in(tmp_path)


def rows_in(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "out" / "detections.json").read_text())


def image_with(*corners: tuple[int, int], hw: tuple[int, int] = (60, 80), side: int = 8) -> np.ndarray:
    image = np.full((*hw, 3), 200, np.uint8)
    for left, top in corners:
        image[top : top + side, left : left + side] = (200, 0, 0)
    return image


def write_moving(path: Path, frames: int) -> Path:
    """A video of 10 fps with two squares that move to the right by 4 px a frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (160, 96))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no mp4")
    for number in range(frames):
        image = image_with((8 + 4 * number, 8), (24 + 4 * number, 56), hw=(96, 160), side=24)
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        write_png(tmp_path / "in" / f"{number}.png", image_with(*[(12 * k, 10) for k in range(number)]))
    return tmp_path / "in"


@pytest.mark.usefixtures("detector")
def test_a_folder_ends_as_json_labels_and_copies(tmp_path: Path, folder: Path, capsys):
    (folder / "broken.png").write_bytes(b"no image")
    rows = run(tmp_path, folder, "--save-txt")
    assert [(Path(row["file"]).stem, len(row["objects"])) for row in rows] == [(str(n), n) for n in range(5)]
    assert rows[2]["objects"][1] == {"class": "square", "score": 0.9, "bbox": [12, 10, 8, 8]}
    read = open_image_set(tmp_path / "out", "train")
    assert len(read) == 5 and len(read.labels) == 10 and set(read.labels.tolist()) == {1}
    said = capsys.readouterr().out.splitlines()
    assert "broken.png: cannot be read, skipped" in said[-2]
    assert said[-1] == f"5 images annotated, 1 unreadable; they are in {tmp_path / 'out'}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_was_found(tmp_path: Path, detector, monkeypatch, number):
    for name in range(40):
        write_png(tmp_path / "in" / f"{name:02d}.png", image_with())

    def send(count: int) -> None:
        if count == 3:
            os.kill(os.getpid(), number)

    stopping = replace(detector, on_image=send)
    monkeypatch.setattr(detect.Detector, "load", lambda *_, **__: stopping)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, tmp_path / "in")
    assert ended.value.code == 130
    assert 3 <= len(rows_in(tmp_path)) == len(detector.seen) == len(list((tmp_path / "out").glob("*.png"))) < 40


@pytest.mark.usefixtures("detector")
def test_the_json_is_whole_at_any_time(tmp_path: Path, folder: Path, monkeypatch):
    """Even if the program is killed in the middle."""
    lengths: list[int] = []
    monkeypatch.setattr(detect.Progress, "advance", lambda _: lengths.append(len(rows_in(tmp_path))))
    run(tmp_path, folder)
    assert lengths == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", ["auto", 1, 3, 7])
@pytest.mark.usefixtures("detector")
def test_images_are_in_their_order_whatever_the_batch_size(tmp_path: Path, folder: Path, size):
    (folder / "1-broken.png").write_bytes(b"no image")
    (folder / "3-broken.png").write_bytes(b"no image")
    rows = run(tmp_path, folder, write_video(tmp_path / "x.mp4"), folder / "2.png", "--batch-size", size)
    images = [row for row in rows if not row["file"].endswith(".mp4")]
    assert [(Path(row["file"]).stem, len(row["objects"])) for row in images] == [
        *[(str(n), n) for n in range(5)],
        ("2", 2),
    ]
    assert [row["frame"] for row in rows[5:-1]] == list(range(len(rows) - 6))


@pytest.mark.usefixtures("detector")
def test_a_full_disk_ends_the_threads_with_one_sentence(tmp_path: Path, folder: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.save_detections.write_image", full)
    before = threading.active_count()
    with pytest.raises(UserError, match=r"out: cannot be written to \(No space left on device\)"):
        run(tmp_path, folder)
    assert threading.active_count() == before


@pytest.mark.usefixtures("detector")
def test_only_the_classes_asked_for_are_kept(tmp_path: Path, folder: Path):
    assert [row["objects"] for row in run(tmp_path, folder, "--classes", "other")] == [[]] * 5
    with pytest.raises(UserError, match="the network knows no 'dog', but other, square"):
        run(tmp_path, folder, "--classes", "dog")


@dataclass(frozen=True, kw_only=True)
class WithOther(RedSquares):
    """Finds an "other" in every image, too, with a higher score, and keeps the best `max_detections`."""

    def _one(self, image: np.ndarray) -> Detections:
        found = super()._one(image)
        whole = torch.tensor([[0.0, 0, *image.shape[1::-1]]])
        scores, labels = (
            torch.cat((torch.tensor([0.95]), found.scores)),
            torch.cat((torch.zeros(1).long(), found.labels)),
        )
        both = Detections(boxes=torch.cat((whole, found.boxes)), scores=scores, labels=labels)
        return both.where(torch.arange(len(both))[: self.max_detections])


@pytest.mark.parametrize("tile", [(), ("--tile", 40)])
def test_max_detections_are_of_the_classes_asked_for(tmp_path: Path, folder: Path, tile, monkeypatch):
    monkeypatch.setattr(detect.Detector, "load", lambda *_, **__: WithOther(seen=[]))
    rows = run(tmp_path, folder, "--classes", "square", "--max-detections", 1, *tile)
    assert [len(row["objects"]) for row in rows] == [0, 1, 1, 1, 1]


def test_a_large_image_is_seen_in_tiles(tmp_path: Path, detector):
    write_png(tmp_path / "x.png", image_with((3, 3), (95, 40), (290, 90), hw=(100, 300)))
    (row,) = run(tmp_path, tmp_path / "x.png", "--tile", 100)
    assert sorted(each["bbox"] for each in row["objects"]) == [[3, 3, 8, 8], [95, 40, 8, 8], [290, 90, 8, 8]]
    assert detector.seen == [(100, 300)] + [(100, 100)] * 4


@pytest.mark.parametrize("tile", [100, 400])
@pytest.mark.usefixtures("detector")
def test_max_detections_are_counted_in_an_image_not_in_a_tile(tmp_path: Path, tile):
    write_png(tmp_path / "x.png", image_with((3, 3), (95, 40), (290, 90), hw=(100, 300)))
    (row,) = run(tmp_path, tmp_path / "x.png", "--tile", tile, "--max-detections", 2)
    assert len(row["objects"]) == 2


def test_every_other_frame_of_a_video(tmp_path: Path, detector):
    rows = run(tmp_path, write_moving(tmp_path / "x.mp4", 9), "--stride-frames", 2, "--max-frames", 3)
    assert [row["frame"] for row in rows] == [0, 2, 4] and len(detector.seen) == 3
    capture = cv2.VideoCapture(str(tmp_path / "out" / "x.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (3, 5)


@pytest.mark.usefixtures("detector")
def test_the_objects_of_a_video_keep_their_numbers(tmp_path: Path):
    pytest.importorskip("trackers", reason="pip install --no-deps trackers, and the extra [track]")
    rows = run(tmp_path, write_moving(tmp_path / "x.mp4", 10), "--track")
    tracks = [[each["track"] for each in sorted(row["objects"], key=lambda o: o["bbox"][1])] for row in rows]
    assert tracks[0] == [None, None] and sorted(tracks[1]) == [1, 2]
    assert tracks[1:] == [tracks[1]] * 9


@pytest.mark.usefixtures("detector")
def test_images_alone_have_no_tracks(tmp_path: Path, folder: Path):
    pytest.importorskip("trackers", reason="pip install --no-deps trackers, and the extra [track]")
    with pytest.raises(UserError, match="--track follows objects through a video"):
        run(tmp_path, folder, "--track")


@pytest.mark.usefixtures("detector")
@pytest.mark.parametrize("save_video", [True, False])
def test_a_stream_leaves_no_password(tmp_path: Path, capfd, monkeypatch, save_video):
    monkeypatch.setattr("data.live_stream._PAUSES_S", (0.01,))
    with serve() as server:
        server.camera_frames = [12]
        url = f"http://user:secret@{server.host}/camera?key=secret"
        rows = run(tmp_path, url, "--save-txt", "--save-crops", *["--save-video"] * save_video)
    assert {row["file"] for row in rows} == {f"http://{server.host}/camera"}
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert any(name.endswith(".mp4") for name in names) == save_video
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"secret" not in written and "secret" not in "".join([*names, *capfd.readouterr()])


@pytest.mark.usefixtures("detector")
def test_nothing_readable_is_the_users_error(tmp_path: Path):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 image can be read"):
        run(tmp_path, tmp_path / "x.png")


@pytest.mark.usefixtures("detector")
def test_q_in_the_window_ends_it(tmp_path: Path, monkeypatch):
    class Window:
        is_closed = False

        def __init__(self, title: str) -> None:
            self.shown = 0

        def show(self, image: np.ndarray) -> None:
            self.shown += 1
            self.is_closed = self.shown == 2

    monkeypatch.setattr(detect, "Window", Window)
    assert len(run(tmp_path, write_video(tmp_path / "x.mp4"), "--show")) == 2
