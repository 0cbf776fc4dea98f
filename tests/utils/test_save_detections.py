"""What detection leaves on disk."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from data.annotation_formats import open_image_set
from utils.draw import write_png
from utils.errors import UserError
from utils.save_detections import DetectionFiles
from utils.structures import Detections

NAMES = ("cat", "sea/lion")
FOUND = Detections(
    boxes=torch.tensor([[10.0, 5, 30, 25], [0, 0, 40, 30]]),
    scores=torch.tensor([0.875, 0.5]),
    labels=torch.tensor([1, 0]),
)


@dataclass(frozen=True)
class From:
    """A source of that path; of no file if `is_file` is False."""

    file: str
    is_file: bool = True

    @property
    def name(self) -> str:
        return self.file

    @property
    def stem(self) -> str:
        return Path(self.file).stem

    @property
    def path(self) -> Path | None:
        return Path(self.file) if self.is_file else None


NOTHING = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.long))


def make_image(value: int = 0) -> np.ndarray:
    """(30, 40): a gradient, so that places can be told apart."""
    image = np.full((30, 40, 3), value, np.uint8)
    image[..., 0], image[..., 1] = np.arange(40) * 5, np.arange(30)[:, None] * 7
    return image


def files_in(folder: Path, **switches: Any) -> DetectionFiles:
    return DetectionFiles(folder, NAMES, **{"save_json": False, "save_txt": False, "save_crops": False, **switches})


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rgb(path: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def test_by_default_there_are_annotated_copies_only(tmp_path: Path):
    with files_in(tmp_path / "new" / "run") as files:
        files.add(From("a/x.JPG"), make_image(), FOUND)
        files.add(From("a/empty.png"), make_image(9), NOTHING)
        files.add(From("web", is_file=False), make_image(), NOTHING)
    assert written(tmp_path / "new" / "run") == ["empty.png", "web.png", "x.jpg"]
    assert files.written == 3
    np.testing.assert_array_equal(rgb(tmp_path / "new" / "run" / "empty.png"), make_image(9))
    assert (rgb(tmp_path / "new" / "run" / "x.jpg") != make_image()).any()


def test_the_copy_of_a_jpeg_is_close_to_it(tmp_path: Path):
    with files_in(tmp_path) as files:
        files.add(From("x.jpeg"), make_image(), NOTHING)
    assert abs(rgb(tmp_path / "x.jpg").astype(int) - make_image()).mean() < 5


def test_images_of_one_name_from_different_folders_both_survive(tmp_path: Path):
    with files_in(tmp_path, save_txt=True) as files:
        for value, path in ((1, "a/x.png"), (2, "b/x.png"), (3, "b/x.bmp"), (4, "a/x-2.png")):
            files.add(From(path), make_image(value), NOTHING)
    assert written(tmp_path) == sorted(
        [f"{name}.png" for name in ("x", "x-2", "x-3", "x-2-2")]
        + [f"labels/{name}.txt" for name in ("x", "x-2", "x-3", "x-2-2")]
        + ["data.yaml"]
    )
    values = {name: rgb(tmp_path / f"{name}.png")[0, 0, 2] for name in ("x", "x-2", "x-3", "x-2-2")}
    assert values == {"x": 1, "x-2": 2, "x-3": 3, "x-2-2": 4}


def test_the_json_holds_an_entry_an_image(tmp_path: Path):
    with files_in(tmp_path, save_json=True) as files:
        files.add(From("a/x.jpg"), make_image(), FOUND)
        files.add(From("b/x.jpg"), make_image(), NOTHING)
    first, second = json.loads((tmp_path / "detections.json").read_text())
    assert first == {
        "file": "a/x.jpg",
        "frame": 0,
        "width": 40,
        "height": 30,
        "objects": [
            {"class": "sea/lion", "score": 0.875, "bbox": [10, 5, 20, 20]},
            {"class": "cat", "score": 0.5, "bbox": [0, 0, 40, 30]},
        ],
    }
    assert second["file"] == "b/x.jpg" and second["objects"] == []


def test_the_json_is_there_even_when_no_image_was(tmp_path: Path):
    with files_in(tmp_path, save_json=True):
        pass
    assert json.loads((tmp_path / "detections.json").read_text()) == []


def test_label_files_are_darknets_with_a_score(tmp_path: Path):
    with files_in(tmp_path, save_txt=True) as files:
        files.add(From("x.jpg"), make_image(), FOUND)
        files.add(From("empty.jpg"), make_image(), NOTHING)
    lines = (tmp_path / "labels" / "x.txt").read_text().splitlines()
    assert lines == [
        "1 0.500000 0.500000 0.500000 0.666667 0.875000",
        "0 0.500000 0.500000 1.000000 1.000000 0.500000",
    ]
    assert (tmp_path / "labels" / "empty.txt").read_text() == ""


def test_crops_are_the_undrawn_pixels_by_class(tmp_path: Path):
    with files_in(tmp_path, save_crops=True) as files:
        files.add(From("x.jpg"), make_image(), FOUND)
    assert written(tmp_path) == ["crops/cat/x-001.png", "crops/sea_lion/x-000.png", "x.jpg"]
    np.testing.assert_array_equal(rgb(tmp_path / "crops" / "sea_lion" / "x-000.png"), make_image()[5:25, 10:30])
    np.testing.assert_array_equal(rgb(tmp_path / "crops" / "cat" / "x-001.png"), make_image())


@pytest.mark.parametrize(
    ("box", "count"), [([10.2, 5.2, 10.4, 5.4], 1), ([39.9, 10, 40, 12], 0), ([0, 0, 0.2, 0.2], 1)]
)
def test_a_crop_thinner_than_a_pixel_has_one_or_is_left_out(tmp_path: Path, box, count):
    thin = Detections(boxes=torch.tensor([box]), scores=torch.ones(1), labels=torch.zeros(1, dtype=torch.long))
    with files_in(tmp_path, save_crops=True) as files:
        files.add(From("x.jpg"), make_image(), thin)
    assert len([name for name in written(tmp_path) if name.startswith("crops")]) == count


@pytest.fixture
def mp4(tmp_path: Path) -> None:
    """Skips where this OpenCV writes no mp4, as builds without ffmpeg do."""
    probe = cv2.VideoWriter(str(tmp_path / "probe.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, (40, 30))
    opened = probe.isOpened()
    probe.release()
    (tmp_path / "probe.mp4").unlink(missing_ok=True)
    if not opened:
        pytest.skip("this OpenCV writes no mp4")


def frames_and_rate(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.mark.usefixtures("mp4")
def test_frames_of_a_video_become_one_video(tmp_path: Path):
    with files_in(tmp_path, save_txt=True, save_json=True) as files:
        for number in range(3):
            found = FOUND if number else NOTHING
            files.add(From("clip.avi"), make_image(), found, number=number, video_fps=10.0)
        files.add(From("other/clip.avi"), make_image(), FOUND, number=0, video_fps=10.0)
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and capture.get(cv2.CAP_PROP_FPS) == 10
    assert (tmp_path / "clip-2.mp4").stat().st_size > 0
    labels = [f"labels/clip/{number:06d}.txt" for number in range(3)] + ["labels/clip-2/000000.txt"]
    assert set(labels) <= set(written(tmp_path))
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert [row["frame"] for row in rows] == [0, 1, 2, 0]


@pytest.mark.usefixtures("mp4")
def test_a_frame_of_another_size_is_fitted_to_the_video(tmp_path: Path):
    sizes = [(30, 40), (60, 80), (16, 24), (30, 40)]
    with files_in(tmp_path, save_json=True) as files:
        for number, (height, width) in enumerate(sizes):
            image = np.full((height, width, 3), 60 * number, np.uint8)
            files.add(From("clip.avi"), image, NOTHING, number=number, video_fps=10.0)
    frames, _ = frames_and_rate(tmp_path / "clip.mp4")
    assert [frame.shape for frame in frames] == [(30, 40, 3)] * 4
    assert [round(float(frame.mean()) / 60) for frame in frames] == [0, 1, 2, 3]
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert [(row["height"], row["width"]) for row in rows] == sizes  # boxes are in each frame's own pixels


@pytest.mark.usefixtures("mp4")
@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_video_without_a_frame_rate_gets_25(tmp_path: Path, fps: float):
    with files_in(tmp_path) as files:
        files.add(From("clip.avi"), make_image(), NOTHING, number=0, video_fps=fps)
    frames, written_fps = frames_and_rate(tmp_path / "clip.mp4")
    assert (len(frames), written_fps) == (1, 25)


def test_a_video_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path):
    (tmp_path / "clip.mp4").mkdir()  # in the video's place
    with files_in(tmp_path) as files, pytest.raises(UserError, match=r"clip\.mp4: .*cannot write"):
        files.add(From("clip.avi"), make_image(), FOUND, number=0, video_fps=10.0)


def test_the_data_set_is_read_back(tmp_path: Path):
    """Images, one without objects, of one name, turned by nothing; a fetched one; and frames of a video."""
    images = [tmp_path / "in" / name for name in ("a/x.png", "b/x.png", "c/empty.png")]
    for value, path in enumerate(images):
        write_png(path, make_image(value))
    with files_in(tmp_path / "out", save_txt=True) as files:
        for path in images:
            files.add(From(str(path)), make_image(), NOTHING if path.stem == "empty" else FOUND)
        files.add(From("web", is_file=False), make_image(7), FOUND)
        for number in (3, 5):
            files.add(From("x.avi"), make_image(number), FOUND, number=number, video_fps=10.0, annotate=False)
    read = open_image_set(tmp_path / "out", "train")
    assert read.class_names == NAMES
    paths = [os.path.relpath(path, tmp_path / "out" / "images") for path in map(os.fsdecode, read.paths)]
    assert sorted(paths) == ["empty.png", "web.png", "x-2.png", "x-3/000003.png", "x-3/000005.png", "x.png"]
    for index, path in enumerate(paths):
        record = read[index]
        count = 0 if path == "empty.png" else len(FOUND)
        np.testing.assert_allclose(record.boxes, FOUND.boxes[:count], atol=1e-4)
        assert record.labels.tolist() == FOUND.labels.tolist()[:count]
        assert record.hw == (30, 40)
    np.testing.assert_array_equal(rgb(tmp_path / "out" / "images" / "x-2.png"), make_image(1))
    np.testing.assert_array_equal(rgb(tmp_path / "out" / "images" / "x-3" / "000005.png"), make_image(5))
    for value, path in enumerate(images):
        np.testing.assert_array_equal(rgb(path), make_image(value))  # the originals


def test_a_system_without_links_gets_copies(tmp_path: Path, monkeypatch):
    write_png(tmp_path / "x.png", make_image(4))
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    with files_in(tmp_path / "out", save_txt=True) as files:
        files.add(From(str(tmp_path / "x.png")), make_image(4), FOUND)
    copy = tmp_path / "out" / "images" / "x.png"
    assert not copy.is_symlink() and copy.read_bytes() == (tmp_path / "x.png").read_bytes()


def test_tracks_are_in_the_json_and_on_the_image(tmp_path: Path):
    image = np.zeros((300, 400, 3), np.uint8)
    with files_in(tmp_path, save_json=True) as files:
        without = files.add(From("x.jpg"), image, FOUND)
        drawn = files.add(From("y.jpg"), image, FOUND, tracks=[7, None])
    first, second = json.loads((tmp_path / "detections.json").read_text())
    assert [row.get("track", "absent") for row in first["objects"]] == ["absent", "absent"]
    assert [row["track"] for row in second["objects"]] == [7, None]
    assert (drawn != without).any()


@pytest.mark.parametrize("name", ["..", ".", "", "a/../../b"])
def test_crops_of_a_class_of_any_name_stay_in_their_folder(tmp_path: Path, name: str):
    with DetectionFiles(tmp_path, (name, "b"), save_json=False, save_txt=False, save_crops=True) as files:
        files.add(From("x.jpg"), make_image(), FOUND.where(FOUND.labels == 0))
    (crop,) = (path for path in written(tmp_path) if path != "x.jpg")
    assert crop.split("/")[0] == "crops" and len(crop.split("/")) == 3 and ".." not in crop.split("/")


@pytest.mark.usefixtures("mp4")
def test_missed_frames_of_a_stream_keep_the_time(tmp_path: Path):
    with files_in(tmp_path) as files:
        for number in (0, 1, 4, 5):
            files.add(From("cam"), make_image(), NOTHING, number=number, video_fps=10.0)
    frames, fps = frames_and_rate(tmp_path / "cam.mp4")
    assert (len(frames), fps) == (6, 10)


@pytest.mark.usefixtures("mp4")
def test_of_every_third_frame_the_video_is_as_long(tmp_path: Path):
    with files_in(tmp_path, stride_frames=3) as files:
        for number in (0, 3, 6):
            files.add(From("clip.avi"), make_image(), NOTHING, number=number, video_fps=30.0)
    frames, fps = frames_and_rate(tmp_path / "clip.mp4")
    assert (len(frames), fps) == (3, 10)


def test_of_an_unannotated_stream_the_json_is_kept(tmp_path: Path):
    with files_in(tmp_path, save_json=True) as files:
        files.add(From("cam"), make_image(), FOUND, video_fps=10.0, annotate=False)
    assert written(tmp_path) == ["detections.json"] and files.written == 1


def test_a_full_disk_is_an_error_of_the_user_and_the_json_whole(tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with files_in(tmp_path, save_json=True) as files:
        files.add(From("x.jpg"), make_image(), FOUND)
        monkeypatch.setattr("utils.save_detections.write_image", full)
        with pytest.raises(UserError, match="No space left"):
            files.add(From("y.jpg"), make_image(), FOUND)
        assert [row["file"] for row in json.loads((tmp_path / "detections.json").read_text())] == ["x.jpg"]


def test_thousands_of_images_of_one_name_are_numbered_in_linear_time(tmp_path: Path):
    files = files_in(tmp_path)
    names = [files._name_of(From(f"{folder}/x.jpg")) for folder in range(20_000)]
    assert names[:3] == ["x", "x-2", "x-3"] and len(set(names)) == 20_000
