"""What detection leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.save_detections import DetectionFiles
from utils.structures import Detections

NAMES = ("cat", "sea/lion")
FOUND = Detections(
    boxes=torch.tensor([[10.0, 5, 30, 25], [0, 0, 40, 30]]),
    scores=torch.tensor([0.875, 0.5]),
    labels=torch.tensor([1, 0]),
)
NOTHING = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.long))


def make_image(value: int = 0) -> np.ndarray:
    """(30, 40): a gradient, so that places can be told apart."""
    image = np.full((30, 40, 3), value, np.uint8)
    image[..., 0], image[..., 1] = np.arange(40) * 5, np.arange(30)[:, None] * 7
    return image


def files_in(folder: Path, **switches: bool) -> DetectionFiles:
    return DetectionFiles(folder, NAMES, **{"save_json": False, "save_txt": False, "save_crops": False, **switches})


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rgb(path: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def test_by_default_there_are_annotated_copies_only(tmp_path: Path):
    with files_in(tmp_path / "new" / "run") as files:
        files.add(Path("a/x.jpg"), make_image(), FOUND, number=0, video_fps=None)
        files.add(Path("a/empty.jpg"), make_image(9), NOTHING, number=0, video_fps=None)
    assert written(tmp_path / "new" / "run") == ["empty.png", "x.png"]
    assert files.written == 2
    np.testing.assert_array_equal(rgb(tmp_path / "new" / "run" / "empty.png"), make_image(9))
    assert (rgb(tmp_path / "new" / "run" / "x.png") != make_image()).any()


def test_images_of_one_name_from_different_folders_both_survive(tmp_path: Path):
    with files_in(tmp_path, save_txt=True) as files:
        for value, path in ((1, "a/x.jpg"), (2, "b/x.jpg"), (3, "b/x.png"), (4, "a/x-2.jpg")):
            files.add(Path(path), make_image(value), NOTHING, number=0, video_fps=None)
    assert written(tmp_path) == sorted(
        [f"{name}.png" for name in ("x", "x-2", "x-3", "x-2-2")]
        + [f"labels/{name}.txt" for name in ("x", "x-2", "x-3", "x-2-2")]
    )
    values = {name: rgb(tmp_path / f"{name}.png")[0, 0, 2] for name in ("x", "x-2", "x-3", "x-2-2")}
    assert values == {"x": 1, "x-2": 2, "x-3": 3, "x-2-2": 4}


def test_the_json_holds_an_entry_an_image(tmp_path: Path):
    with files_in(tmp_path, save_json=True) as files:
        files.add(Path("a/x.jpg"), make_image(), FOUND, number=0, video_fps=None)
        files.add(Path("b/x.jpg"), make_image(), NOTHING, number=0, video_fps=None)
    first, second = json.loads((tmp_path / "detections.json").read_text())
    assert first == {
        "file": str(Path("a/x.jpg")),
        "frame": 0,
        "width": 40,
        "height": 30,
        "objects": [
            {"class": "sea/lion", "score": 0.875, "bbox": [10, 5, 20, 20]},
            {"class": "cat", "score": 0.5, "bbox": [0, 0, 40, 30]},
        ],
    }
    assert second["file"] == str(Path("b/x.jpg")) and second["objects"] == []


def test_the_json_is_there_even_when_no_image_was(tmp_path: Path):
    with files_in(tmp_path, save_json=True):
        pass
    assert json.loads((tmp_path / "detections.json").read_text()) == []


def test_label_files_are_darknets_with_a_score(tmp_path: Path):
    with files_in(tmp_path, save_txt=True) as files:
        files.add(Path("x.jpg"), make_image(), FOUND, number=0, video_fps=None)
        files.add(Path("empty.jpg"), make_image(), NOTHING, number=0, video_fps=None)
    lines = (tmp_path / "labels" / "x.txt").read_text().splitlines()
    assert lines == [
        "1 0.500000 0.500000 0.500000 0.666667 0.875000",
        "0 0.500000 0.500000 1.000000 1.000000 0.500000",
    ]
    assert (tmp_path / "labels" / "empty.txt").read_text() == ""


def test_crops_are_the_undrawn_pixels_by_class(tmp_path: Path):
    with files_in(tmp_path, save_crops=True) as files:
        files.add(Path("x.jpg"), make_image(), FOUND, number=0, video_fps=None)
    assert written(tmp_path) == ["crops/cat/x-001.png", "crops/sea_lion/x-000.png", "x.png"]
    np.testing.assert_array_equal(rgb(tmp_path / "crops" / "sea_lion" / "x-000.png"), make_image()[5:25, 10:30])
    np.testing.assert_array_equal(rgb(tmp_path / "crops" / "cat" / "x-001.png"), make_image())


@pytest.mark.parametrize(
    ("box", "count"), [([10.2, 5.2, 10.4, 5.4], 1), ([39.9, 10, 40, 12], 0), ([0, 0, 0.2, 0.2], 1)]
)
def test_a_crop_thinner_than_a_pixel_has_one_or_is_left_out(tmp_path: Path, box, count):
    thin = Detections(boxes=torch.tensor([box]), scores=torch.ones(1), labels=torch.zeros(1, dtype=torch.long))
    with files_in(tmp_path, save_crops=True) as files:
        files.add(Path("x.jpg"), make_image(), thin, number=0, video_fps=None)
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
            files.add(Path("clip.avi"), make_image(), found, number=number, video_fps=10.0)
        files.add(Path("other/clip.avi"), make_image(), FOUND, number=0, video_fps=10.0)
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and capture.get(cv2.CAP_PROP_FPS) == 10
    assert (tmp_path / "clip-2.mp4").stat().st_size > 0
    labels = [f"labels/clip-{number:06d}.txt" for number in range(3)] + ["labels/clip-2-000000.txt"]
    assert set(labels) <= set(written(tmp_path))
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert [row["frame"] for row in rows] == [0, 1, 2, 0]


@pytest.mark.usefixtures("mp4")
def test_a_frame_of_another_size_is_fitted_to_the_video(tmp_path: Path):
    sizes = [(30, 40), (60, 80), (16, 24), (30, 40)]
    with files_in(tmp_path, save_json=True) as files:
        for number, (height, width) in enumerate(sizes):
            image = np.full((height, width, 3), 60 * number, np.uint8)
            files.add(Path("clip.avi"), image, NOTHING, number=number, video_fps=10.0)
    frames, _ = frames_and_rate(tmp_path / "clip.mp4")
    assert [frame.shape for frame in frames] == [(30, 40, 3)] * 4
    assert [round(float(frame.mean()) / 60) for frame in frames] == [0, 1, 2, 3]
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert [(row["height"], row["width"]) for row in rows] == sizes  # boxes are in each frame's own pixels


@pytest.mark.usefixtures("mp4")
@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_video_without_a_frame_rate_gets_25(tmp_path: Path, fps: float):
    with files_in(tmp_path) as files:
        files.add(Path("clip.avi"), make_image(), NOTHING, number=0, video_fps=fps)
    frames, written_fps = frames_and_rate(tmp_path / "clip.mp4")
    assert (len(frames), written_fps) == (1, 25)


def test_a_video_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path):
    (tmp_path / "clip.mp4").mkdir()  # in the video's place
    with files_in(tmp_path) as files, pytest.raises(UserError, match=r"clip\.mp4: .*cannot write"):
        files.add(Path("clip.avi"), make_image(), FOUND, number=0, video_fps=10.0)
