"""Live streams and webcams: always the newest frame, and a connection that is made again where it breaks off."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import cv2
import numpy as np

_TIMEOUT_MS = 10_000  # for a connection, and for the next frame
_PAUSES_S = (0.5, 1, 2, 4, 8, 15, 30)  # before each attempt to connect again; after the last one it is given up
_LOOK_UP_S = 0.2  # how often a wait for a frame asks whether it should end

# FFmpeg would write addresses with their passwords to stderr. Read by OpenCV on its first video, from then on fixed.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def open_capture(address: str | int) -> cv2.VideoCapture:
    """Open a video file, an address or the number of a webcam; see `isOpened` for whether that worked."""
    if isinstance(address, str) and "://" in address:
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
        return cv2.VideoCapture(address, cv2.CAP_FFMPEG, timeouts)
    return cv2.VideoCapture(address)


class LiveStream:
    """The newest frame of an open capture, which a thread reads as fast as the frames come.

    Frames that nobody fetches in time are lost, so that what is detected is what happens now.
    """

    def __init__(self, address: str | int, capture: cv2.VideoCapture) -> None:
        self._address, self._capture = address, capture
        self._newest: deque[tuple[int, float, np.ndarray]] = deque(maxlen=1)
        self._notes: SimpleQueue[str] = SimpleQueue()
        self._arrived, self._closing, self._is_over = threading.Event(), threading.Event(), threading.Event()

    def frames(
        self, *, say: Callable[[str], None], is_stopped: Callable[[], bool]
    ) -> Iterator[tuple[int, float, np.ndarray]]:
        """Yield (number, seconds since the first, (H, W, 3) uint8 BGR) until the stream is given up or `is_stopped`.

        number: among all frames that came, so gaps are lost frames. say: receives a line for each break and return.
        """
        thread = threading.Thread(target=self._read, name="live stream", daemon=True)
        thread.start()
        try:
            while not is_stopped():
                is_over = self._is_over.is_set()  # asked first: what came before it is still shown
                self._arrived.wait(_LOOK_UP_S)
                self._arrived.clear()
                while not self._notes.empty():
                    say(self._notes.get())
                if self._newest:
                    yield self._newest.pop()
                elif is_over:
                    return
        finally:
            self._closing.set()
            thread.join()  # at most a timeout; a thread inside FFmpeg would crash the exit

    def _read(self) -> None:
        """Run in the thread."""
        capture, number, began_s = self._capture, 0, time.monotonic()
        lost_s, pauses = 0.0, iter(_PAUSES_S)
        while True:
            while not self._closing.is_set():
                got, image = capture.read()
                if not got:
                    break
                if lost_s:
                    self._notes.put(f"back after {time.monotonic() - lost_s:.0f} s")
                    lost_s, pauses = 0.0, iter(_PAUSES_S)
                self._newest.append((number, time.monotonic() - began_s, image))
                self._arrived.set()
                number += 1
            capture.release()
            lost_s = lost_s or time.monotonic()
            pause_s = next(pauses, None)
            if self._closing.is_set() or pause_s is None:
                break
            self._notes.put(f"no more frames; connecting again in {pause_s:g} s")
            self._arrived.set()
            if self._closing.wait(pause_s):
                break
            capture = open_capture(self._address)
        if not self._closing.is_set():
            self._notes.put(f"no frames for {time.monotonic() - lost_s:.0f} s, given up")
        self._is_over.set()
        self._arrived.set()
