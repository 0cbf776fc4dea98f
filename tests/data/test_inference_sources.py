"""What detection runs on: every way of naming images and videos, and what cannot be read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.inference_sources import Source, find_sources
from utils.errors import UserError


def write_image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((6, 8, 3), (10, 20, value), np.uint8)  # BGR
    assert cv2.imwrite(str(path), image)
    return path


def write_video(path: Path, frames: int = 5) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 12.0, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no mp4")
    for number in range(frames):
        writer.write(np.full((48, 64, 3), (0, 0, 50 * number), np.uint8))
    writer.release()
    return path


def names_of(sources: list[Source]) -> list[str]:
    return [source.path.name for source in sources]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.PNG", "c.bmp"):
        write_image(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    write_image(tmp_path / "in" / "deeper" / "d.png")
    return tmp_path / "in"


def test_one_image_is_one_frame(tmp_path: Path):
    (source,) = find_sources([str(write_image(tmp_path / "x.png", 200))])
    assert (source.is_video, source.frames) == (False, 1)
    (frame,) = source.read()
    assert (frame.source, frame.number) == (source, 0)
    assert frame.image.shape == (6, 8, 3) and frame.image.dtype == np.uint8
    assert frame.image[0, 0].tolist() == [200, 20, 10]  # RGB


def test_a_folder_gives_its_own_images_sorted(folder: Path):
    assert names_of(find_sources([str(folder)])) == ["a.PNG", "b.png", "c.bmp"]


def test_a_glob_gives_its_images_sorted(folder: Path):
    assert names_of(find_sources([str(folder / "*.png")])) == ["b.png"]
    assert names_of(find_sources([str(folder / "*")])) == ["a.PNG", "b.png", "c.bmp"]
    assert names_of(find_sources([str(folder / "**" / "*.png")])) == ["b.png", "d.png"]


def test_names_keep_the_order_typed(folder: Path):
    typed = [str(folder / "c.bmp"), str(folder / "deeper"), str(folder / "b.png")]
    assert names_of(find_sources(typed)) == ["c.bmp", "d.png", "b.png"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path):
    write_image(tmp_path / "x1.png")
    write_image(tmp_path / "x[1].png")
    assert names_of(find_sources([str(tmp_path / "x[1].png")])) == ["x[1].png"]


def test_a_folder_whose_name_is_a_number_is_a_folder(tmp_path: Path, monkeypatch):
    write_image(tmp_path / "0" / "x.png")
    monkeypatch.chdir(tmp_path)
    assert names_of(find_sources(["0"])) == ["x.png"]


def test_the_home_folder_may_be_abbreviated(tmp_path: Path, monkeypatch):
    write_image(tmp_path / "x.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert names_of(find_sources([os.path.join("~", "x.png")])) == ["x.png"]


def test_a_name_that_begins_as_that_of_a_user(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "~tmp.png")
    assert names_of(find_sources(["~tmp.png"])) == ["~tmp.png"]
    with pytest.raises(UserError, match=r"~no-such-user/x\.png: no such image"):
        find_sources(["~no-such-user/x.png"])


@pytest.mark.parametrize("content", [b"", b"not an image at all"])
def test_an_unreadable_image_is_a_frame_without_an_image(tmp_path: Path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    (source,) = find_sources([str(tmp_path)])
    (frame,) = source.read()
    assert frame.image is None and frame.source == source


def test_a_video_is_its_frames(tmp_path: Path):
    (source,) = find_sources([str(write_video(tmp_path / "x.mp4"))])
    assert (source.is_video, source.frames, source.fps) == (True, 5, 12)
    frames = list(source.read())
    assert [frame.number for frame in frames] == [0, 1, 2, 3, 4]
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}
    red = [frame.image[..., 0].mean() for frame in frames]
    assert red == pytest.approx([0, 50, 100, 150, 200], abs=12)  # RGB, and in order
    assert max(frame.image[..., 2].mean() for frame in frames) < 12


def test_a_video_can_be_left_early_and_read_again(tmp_path: Path):
    (source,) = find_sources([str(write_video(tmp_path / "x.mp4"))])
    assert next(source.read()).number == 0
    assert len(list(source.read())) == 5


@pytest.mark.parametrize(("stride", "numbers"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_every_nth_frame_of_a_video(tmp_path: Path, stride, numbers):
    (source,) = find_sources([str(write_video(tmp_path / "x.mp4"))])
    frames = list(source.read(stride=stride))
    assert [frame.number for frame in frames] == numbers
    assert [frame.time_s for frame in frames] == pytest.approx([number / 12 for number in numbers])
    assert [frame.image[..., 0].mean() for frame in frames] == pytest.approx([50 * n for n in numbers], abs=12)


def test_a_fifo_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "x.png")
    others: Counter[str] = Counter()
    with pytest.raises(UserError, match="holds no image"):
        find_sources([str(tmp_path)], others)
    assert others == {"no regular file": 1}
    with pytest.raises(UserError, match="no such image"):
        find_sources([str(tmp_path / "x.png")])


def test_a_webcam_is_a_live_stream(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: Capture(0, 30))
    (source,) = find_sources(["0"])
    assert (source.name, source.is_video, source.frames, source.fps) == ("webcam0", True, 0, 30)
    assert source.live is not None


def test_a_whole_film_in_parts_is_no_live_stream(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: Capture(250, 25))
    (film,) = find_sources(["http://host/film.m3u8"])
    assert (film.live, film.frames) == (None, 250)
    (camera,) = find_sources(["rtsp://host/recording"])  # may be read again from its middle only
    assert camera.live is not None


def test_a_folder_may_hold_both(tmp_path: Path):
    write_video(tmp_path / "b.mp4")
    write_image(tmp_path / "a.png")
    assert [(s.path.name, s.is_video) for s in find_sources([str(tmp_path)])] == [("a.png", False), ("b.mp4", True)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.png", "no such image, folder or video"),
        ("gone", "no such image, folder or video"),
        ("empty", "holds no image"),
        ("gone*.png", "holds no image"),
        ("notes.txt", "its suffix is neither that of an image nor that of a video"),
        ("broken.mp4", "cannot be opened as a video"),
    ],
)
def test_what_gives_nothing_is_the_users_error(tmp_path: Path, name, message):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    write_image(tmp_path / "good.png")
    with pytest.raises(UserError, match=message) as caught:
        find_sources([str(tmp_path / "good.png"), str(tmp_path / name)])
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("pattern", ["", "*"])
def test_a_broken_video_among_others_is_a_frame_without_an_image(tmp_path: Path, pattern: str):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.mp4").write_bytes(b"not a video")
    write_image(tmp_path / "in" / "a.png")
    write_image(tmp_path / "in" / "c.png")
    sources = find_sources([str(tmp_path / "in" / pattern)])
    assert names_of(sources) == ["a.png", "b.mp4", "c.png"]
    frames = [frame for source in sources for frame in source.read()]
    assert [frame.image is None for frame in frames] == [False, True, False]
    assert sum(source.frames for source in sources) == len(frames)


class Capture:
    """A stand-in for cv2.VideoCapture: `frames` and `fps` as reported; it opens unless they are None."""

    def __init__(self, frames: float | None, fps: float | None) -> None:
        self.frames, self.fps = frames, fps

    def isOpened(self) -> bool:
        return self.frames is not None

    def get(self, what: int) -> float:
        return (self.frames if what == cv2.CAP_PROP_FRAME_COUNT else self.fps) or 0.0

    def grab(self) -> bool:
        return False

    def release(self) -> None:
        pass


@pytest.mark.parametrize(("reported", "fps"), [(0, 25), (-1, 25), (float("nan"), 25), (float("inf"), 25), (12.5, 12.5)])
@pytest.mark.parametrize(("counted", "frames"), [(7, 7), (-3, 0), (float("nan"), 0), (float("inf"), 0)])
def test_what_a_video_says_of_itself_is_not_believed_blindly(tmp_path, monkeypatch, reported, fps, counted, frames):
    (tmp_path / "x.mp4").write_bytes(b"")
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: Capture(counted, reported))
    (source,) = find_sources([str(tmp_path / "x.mp4")])
    assert (source.fps, source.frames) == (fps, frames)
    assert [frame.image for frame in source.read()] == [None]


def test_a_missing_webcam_is_the_users_error(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: Capture(None, None))
    with pytest.raises(UserError, match="webcam7: no such webcam"):
        find_sources(["7"])
