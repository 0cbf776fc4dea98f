"""Sources for detection: images, folders, globs, videos and webcams, as one stream of Frames."""

from __future__ import annotations

import glob
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.image_file import SUFFIXES, read_image

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
_USUAL_FPS = 25.0  # if a video or webcam gives none


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One image. image: (H, W, 3) uint8 RGB, or None for an image or a whole video that cannot be read.

    number: from 0, within a video.
    """

    source: Source
    number: int
    image: np.ndarray | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One image, video or webcam (its number). frames: the expected number, 0 if unknown."""

    path: Path
    is_video: bool = False
    webcam: int | None = None
    frames: int = 1
    fps: float = 0.0

    def read(self) -> Iterator[Frame]:
        if self.is_video:
            yield from self._read_video()
        else:
            yield Frame(source=self, number=0, image=read_image(str(self.path)))

    def _read_video(self) -> Iterator[Frame]:
        capture = cv2.VideoCapture(str(self.path) if self.webcam is None else self.webcam)
        try:
            number = 0
            while True:
                got, image = capture.read()
                if not got:
                    break
                yield Frame(source=self, number=number, image=cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
                number += 1
            if number == 0:
                yield Frame(source=self, number=0, image=None)
        finally:
            capture.release()


def find_sources(names: Sequence[str], others: Counter[str] | None = None) -> list[Source]:
    """Find the sources in the order of `names`, the files of a folder or a glob sorted.

    others: counts the other files of folders and globs by their endings.
    Raises UserError for a name without any source, and for a named webcam or video that cannot be opened; a broken
    video of a folder or glob becomes one Frame without an image, as a broken image does.
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
    if name.isdigit() and not path.exists():
        yield _video(Path(f"webcam{name}"), webcam=int(name), complaint="no such webcam")
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
        if path.exists() and not path.is_file():  # a folder, or a FIFO, which could be read for ever
            continue
        if path.suffix.lower() in VIDEOS:
            yield _video(path, complaint=complaint)
        elif path.suffix.lower() in SUFFIXES:
            yield Source(path=path)
        else:
            others[path.suffix.lower() or "without ending"] += 1


def _video(path: Path, *, webcam: int | None = None, complaint: str = "") -> Source:
    """Probe a video. Raises UserError with the complaint, if there is one, where it cannot be opened."""
    capture = cv2.VideoCapture(str(path) if webcam is None else webcam)
    try:
        opens = capture.isOpened()
        frames, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    finally:
        capture.release()
    if complaint and not opens:
        raise UserError(f"{path}: {complaint}")
    known = opens and webcam is None and math.isfinite(frames)
    return Source(
        path=path,
        is_video=True,
        webcam=webcam,
        frames=max(0, int(frames)) if known else int(not opens),
        fps=fps if math.isfinite(fps) and fps > 0 else _USUAL_FPS,
    )
