"""Live streams: the newest frame, breaks and returns; with captures that do as they are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from data import live_stream
from data.inference_sources import find_sources
from data.live_stream import LiveStream
from tests.data.web_server import serve


class Capture:
    """A stand-in for cv2.VideoCapture that has so many frames; each waits for a token of `pace`, if there is one."""

    def __init__(self, frames: int, pace: threading.Semaphore | None = None) -> None:
        self.left, self.pace, self.released = frames, pace, False

    def isOpened(self) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        if self.left == 0:
            return False, None
        if self.pace is not None:
            self.pace.acquire()
        self.left -= 1
        return True, np.zeros((2, 2, 3), np.uint8)

    def release(self) -> None:
        self.released = True


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_stream, "_PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(live_stream, "_LOOK_UP_S", 0.01)


def never() -> bool:
    return False


def connections(monkeypatch: pytest.MonkeyPatch, *captures: Capture) -> list[str | int]:
    """Let these be what the next connections open, and then none with a frame. Returns the addresses opened."""
    left, opened = list(captures), []

    def open_capture(address: str | int) -> Capture:
        opened.append(address)
        return left.pop(0) if left else Capture(0)

    monkeypatch.setattr(live_stream, "open_capture", open_capture)
    return opened


@pytest.mark.usefixtures("quick")
def test_a_slow_reader_gets_the_newest_frame_and_no_queue(monkeypatch):
    connections(monkeypatch)
    pace = threading.Semaphore(0)
    capture = Capture(100, pace)
    frames = LiveStream("x", capture).frames(say=lambda _: None, is_stopped=never)
    pace.release()
    assert next(frames)[0] == 0
    pace.release(50)
    while capture.left > 49:
        time.sleep(0.001)
    time.sleep(0.01)
    assert next(frames)[0] == 50
    pace.release(50)
    *_, (last, _, _) = frames
    assert last == 99


@pytest.mark.usefixtures("quick")
def test_a_stream_that_returns_goes_on_and_says_so(monkeypatch):
    """Numbers go on, and the number of attempts begins anew after each return."""
    opened = connections(monkeypatch, Capture(0), Capture(0), Capture(3), Capture(0), Capture(0), Capture(2))
    first, notes = Capture(4), []
    *_, (last, seconds, image) = LiveStream("cam", first).frames(say=notes.append, is_stopped=never)
    assert (last, image.shape) == (8, (2, 2, 3)) and seconds > 0
    assert opened == ["cam"] * 9 and first.released
    lost, back, gone = "no more frames; connecting again in 0.01 s", "back after 0 s", "no frames for 0 s, given up"
    assert notes == [lost] * 3 + [back] + [lost] * 3 + [back] + [lost] * 3 + [gone]


@pytest.mark.usefixtures("quick")
def test_a_stream_without_any_frame_ends(monkeypatch):
    opened = connections(monkeypatch)
    assert list(LiveStream(0, Capture(0)).frames(say=lambda _: None, is_stopped=never)) == []
    assert opened == [0] * 3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("has_frames", [True, False])
def test_a_stop_ends_the_wait_for_a_frame(monkeypatch, has_frames):
    monkeypatch.setattr(live_stream, "_PAUSES_S", (1000,))
    stop, capture = threading.Event(), Capture(int(has_frames))
    frames = LiveStream("x", capture).frames(say=lambda _: stop.set(), is_stopped=stop.is_set)
    assert len(list(frames)) == has_frames
    assert threading.active_count() == 1 or not any(each.name == "live stream" for each in threading.enumerate())


@pytest.mark.usefixtures("quick")
def test_a_reader_that_leaves_ends_the_thread(monkeypatch):
    connections(monkeypatch)
    frames: Iterator = LiveStream("x", Capture(10**9)).frames(say=lambda _: None, is_stopped=never)
    next(frames)
    frames.close()
    assert not any(each.name == "live stream" for each in threading.enumerate())


@pytest.mark.usefixtures("quick")
def test_a_camera_on_the_web_breaks_off_and_returns():
    with serve() as server:
        server.camera_frames = [20, 15]
        (source,) = find_sources([f"http://{server.host}/camera"])
        assert (source.is_video, source.frames, source.live is None) == (True, 0, False)
        notes: list[str] = []
        frames = list(source.read(say=notes.append))
    assert frames[-1].number == 34 and len(frames) > 2
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}
    for frame in frames:  # RGB, and of the second connection again from 0
        red = 10 * (frame.number - 20 * (frame.number >= 20))
        assert frame.image.mean((0, 1)).tolist() == pytest.approx([red, 0, 0], abs=12)
    assert [note.partition(": ")[2].partition(";")[0] for note in notes][:2] == ["no more frames", "back after 0 s"]
    assert all(note.startswith(f"http://{server.host}/camera: ") for note in notes)
    assert "given up" in notes[-1]


@pytest.mark.usefixtures("quick")
def test_every_third_frame_of_a_stream():
    with serve() as server:
        server.camera_frames = [30]
        (source,) = find_sources([f"http://{server.host}/camera"])
        numbers = [frame.number for frame in source.read(stride=3, say=lambda _: None)]
    assert len(numbers) > 1 and all(later - earlier >= 3 for earlier, later in pairwise(numbers))
