"""Sources for detection: images, folders, globs, videos, addresses and webcams, as one stream of Frames."""

from __future__ import annotations

import glob
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data.live_stream import LiveStream, open_capture
from data.web_address import WebAddress
from utils.errors import UserError
from utils.image_file import SUFFIXES, read_image

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
_USUAL_FPS = 25.0  # if a video or webcam gives none


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One image. image: (H, W, 3) uint8 RGB, or None for an image or a whole video that cannot be read.

    number: from 0, within a video; of a live stream also those count that nobody saw. time_s: since its first frame.
    """

    source: Source
    number: int
    image: np.ndarray | None
    time_s: float = 0.0


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """One image, video or live stream.

    name: for people and files, without passwords. stem: how its files' names begin. path: None of what is no file.
    frames: the expected number, 0 if unknown. fps: of a video.
    """

    name: str
    stem: str
    path: Path | None = None
    address: WebAddress | int | None = None
    is_video: bool = False
    frames: int = 1
    fps: float = 0.0
    live: LiveStream | None = None

    def read(
        self, *, stride: int = 1, say: Callable[[str], None] = print, is_stopped: Callable[[], bool] = _never
    ) -> Iterator[Frame]:
        """Yield the image, or every `stride`-th frame. say: receives a line if a live stream breaks off or returns."""
        if self.live is not None:
            yield from self._read_live(self.live, stride, say, is_stopped)
        elif self.is_video:
            yield from self._read_video(stride)
        elif isinstance(self.address, WebAddress):
            yield Frame(source=self, number=0, image=self.address.read_image(say))
        else:
            yield Frame(source=self, number=0, image=read_image(str(self.path)))

    def _read_video(self, stride: int) -> Iterator[Frame]:
        capture = open_capture(self.address.url if isinstance(self.address, WebAddress) else str(self.path))
        try:
            number = 0
            while capture.grab():
                if number % stride == 0:
                    got, image = capture.retrieve()
                    if not got:
                        break
                    rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                    yield Frame(source=self, number=number, image=rgb, time_s=number / self.fps)
                number += 1
            if number == 0:
                yield Frame(source=self, number=0, image=None)
        finally:
            capture.release()

    def _read_live(
        self, live: LiveStream, stride: int, say: Callable[[str], None], is_stopped: Callable[[], bool]
    ) -> Iterator[Frame]:
        due = 0
        for number, time_s, image in live.frames(say=lambda line: say(f"{self.name}: {line}"), is_stopped=is_stopped):
            if number >= due:
                due = number + stride
                rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                yield Frame(source=self, number=number, image=rgb, time_s=time_s)
        if due == 0:
            yield Frame(source=self, number=0, image=None)


def find_sources(names: Sequence[str], others: Counter[str] | None = None) -> list[Source]:
    """Find the sources in the order of `names`, the files of a folder or a glob sorted.

    others: counts the other files of folders and globs by their endings.
    Raises UserError for a name without any source, and for a named webcam, address or video that cannot be opened; a
    broken video of a folder or glob becomes one Frame without an image, as a broken image does.
    """
    sources: list[Source] = []
    for name in names:
        found = list(_sources_of(name, Counter() if others is None else others))
        if not found:
            raise UserError(f"{name}: holds no image ({', '.join(SUFFIXES)}) and no video")
        sources += found
    return sources


def _sources_of(name: str, others: Counter[str]) -> Iterator[Source]:
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves `~tmp.png` as it is
    if "://" in name:
        yield _web_source(WebAddress.of(name))
    elif name.isdigit() and not path.exists():
        yield _stream(f"webcam{name}", f"webcam{name}", int(name), "no such webcam")
    elif path.is_dir():
        yield from _files(sorted(path.iterdir()), others)
    elif path.is_file():
        if path.suffix.lower() not in {*SUFFIXES, *VIDEOS}:
            raise UserError(f"{path}: its suffix is neither that of an image nor that of a video")
        yield from _files([path], others, complaint="cannot be opened as a video")
    elif glob.has_magic(name):
        yield from _files(sorted(Path(match) for match in glob.glob(name, recursive=True)), others)
    else:
        raise UserError(f"{path}: no such image, folder or video")


def _files(paths: Sequence[Path], others: Counter[str], complaint: str = "") -> Iterator[Source]:
    for path in paths:
        if path.exists() and not path.is_file():
            if not path.is_dir():  # a FIFO or a device could be read for ever
                others["no regular file"] += 1
            continue
        if path.suffix.lower() in VIDEOS:
            capture = open_capture(str(path))
            opens = capture.isOpened()
            if complaint and not opens:
                raise UserError(f"{path}: {complaint}")
            frames, fps = _length(capture)
            capture.release()
            yield Source(
                name=str(path),
                stem=path.stem,
                path=path,
                is_video=True,
                frames=frames if opens else 1,
                fps=fps,
            )
        elif path.suffix.lower() in SUFFIXES:
            yield Source(name=str(path), stem=path.stem, path=path)
        else:
            others[path.suffix.lower() or "without ending"] += 1


def _web_source(address: WebAddress) -> Source:
    """Find out what an address is: an image, a recorded video or a live stream. Raises UserError if unreachable."""
    kind = address.kind(images=SUFFIXES, videos=VIDEOS)
    if kind == "image":
        return Source(name=address.name, stem=address.stem, address=address)
    return _stream(address.name, address.stem, address, "cannot be opened as a video", is_recorded=kind == "recorded")


def _stream(name: str, stem: str, address: WebAddress | int, complaint: str, *, is_recorded: bool = False) -> Source:
    """Open a stream. A live one stays open until it is read: some servers take one connection only.

    Raises UserError with the complaint if that fails.
    """
    opened = address.url if isinstance(address, WebAddress) else address
    capture = open_capture(opened)
    if not capture.isOpened():
        raise UserError(f"{name}: {complaint}")
    frames, fps = _length(capture)
    if is_recorded or (frames and isinstance(address, WebAddress) and address.is_http):  # such as a whole .m3u8
        capture.release()
        return Source(name=name, stem=stem, address=address, is_video=True, frames=frames, fps=fps)
    live = LiveStream(opened, capture)
    return Source(name=name, stem=stem, address=address, is_video=True, frames=0, fps=fps, live=live)


def _length(capture: cv2.VideoCapture) -> tuple[int, float]:
    """Return a video's expected number of frames, 0 if unknown, and its frames per second."""
    frames, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    known = math.isfinite(frames) and frames > 0
    return int(frames) if known else 0, fps if math.isfinite(fps) and fps > 0 else _USUAL_FPS
