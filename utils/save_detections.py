"""Output files of detection: annotated copies, and optionally json, a data set of label files, and crops."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from utils.draw import draw_boxes, write_image, write_png
from utils.errors import UserError
from utils.json_list import JsonList
from utils.structures import Detections

JPEGS = (".jpg", ".jpeg")  # a copy of one is a .jpg: png takes ten times as long, and keeps nothing that jpeg had lost


class Origin(Protocol):
    """What an image is from. name: for detections.json. stem: of its files. path: of an image that is a file."""

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def path(self) -> Path | None: ...


class DetectionFiles:
    """A folder with an annotated copy of each image or video added, jpeg of jpeg, else png; a context manager.

    Images of the same name from different folders get a number, so that none overwrites another.
    """

    def __init__(
        self,
        folder: Path,
        class_names: tuple[str, ...],
        *,
        save_json: bool,
        save_txt: bool,
        save_crops: bool,
        stride_frames: int = 1,
    ) -> None:
        self.folder, self.class_names, self.stride_frames = folder, class_names, stride_frames
        self.save_txt, self.save_crops = save_txt, save_crops
        self.written = 0
        self._names: dict[Origin, str] = {}
        self._taken: set[str] = set()
        self._of_stem: Counter[str] = Counter()
        self._video: _Video | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._json = JsonList(folder / "detections.json") if save_json else None
        if save_txt:
            for name in ("images", "labels"):
                (folder / name).mkdir(exist_ok=True)
            names = json.dumps(list(class_names), ensure_ascii=False)
            content = f"train: images\nnc: {len(class_names)}\nnames: {names}\n"
            (folder / "data.yaml").write_text(content, encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> DetectionFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_video()
        if self._json is not None:
            self._json.close()

    def add(
        self,
        origin: Origin,
        image: np.ndarray,
        found: Detections,
        *,
        number: int = 0,
        video_fps: float | None = None,
        tracks: Sequence[int | None] = (),
        annotate: bool = True,
    ) -> np.ndarray:
        """Write the files of one image, (H, W, 3) uint8 RGB, or of frame `number` of a video; boxes in its pixels.

        tracks: each object's number, or () without tracking. Returns the annotated copy, written if `annotate`.
        Raises UserError if the disk is full; what was written before is whole.
        """
        try:
            return self._add(origin, image, found, number, video_fps, tracks, annotate)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to ({error.strerror or error})") from error

    def _add(
        self,
        origin: Origin,
        image: np.ndarray,
        found: Detections,
        number: int,
        video_fps: float | None,
        tracks: Sequence[int | None],
        annotate: bool,
    ) -> np.ndarray:
        boxes, labels, scores = found.boxes.double().numpy(), found.labels.numpy(), found.scores.numpy()
        drawn = draw_boxes(image, boxes, labels, self.class_names, scores, tracks)
        name = self._name_of(origin)
        if video_fps is not None:
            if annotate:
                self._write_frame(origin, name, drawn, video_fps, number)
            name = f"{name}/{number:06d}"
        elif annotate:
            form = ".jpg" if origin.path is not None and origin.path.suffix.lower() in JPEGS else ".png"
            write_image(self.folder / f"{name}{form}", drawn, form)
        self.written += 1
        if self._json is not None:
            self._json.append(self._row(origin, image, found, number, tracks))
        if self.save_txt:
            self._write_labels(origin, name, image, found, is_frame=video_fps is not None)
        if self.save_crops:
            self._write_crops(name, image, found)
        return drawn

    def _name_of(self, origin: Origin) -> str:
        if origin not in self._names:
            name = origin.stem
            while name in self._taken:
                self._of_stem[origin.stem] += 1
                name = f"{origin.stem}-{self._of_stem[origin.stem] + 1}"
            self._taken.add(name)
            self._names[origin] = name
        return self._names[origin]

    def _write_frame(self, origin: Origin, name: str, drawn: np.ndarray, fps: float, number: int) -> None:
        if self._video is None or self._video.origin != origin:
            self._close_video()
            self._video = _Video(origin, self.folder / f"{name}.mp4", drawn, fps / self.stride_frames, number)
        self._video.write(drawn, number, self.stride_frames)

    def _close_video(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None

    def _row(
        self, origin: Origin, image: np.ndarray, found: Detections, number: int, tracks: Sequence[int | None]
    ) -> dict[str, Any]:
        """Return the image's entry in detections.json; bbox is x, y, width, height in pixels."""
        objects = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        rows: list[dict[str, Any]] = [
            {
                "class": self.class_names[label],
                "score": round(score, 6),
                "bbox": [round(v, 3) for v in (left, top, right - left, bottom - top)],
            }
            for (left, top, right, bottom), score, label in objects
        ]
        for row, track in zip(rows, tracks, strict=bool(tracks)):
            row["track"] = track
        height, width = image.shape[:2]
        return {"file": origin.name, "frame": number, "width": width, "height": height, "objects": rows}

    def _write_labels(self, origin: Origin, name: str, image: np.ndarray, found: Detections, *, is_frame: bool) -> None:
        """Write darknet's label lines, with the score as a sixth number, and the image where readers look for it."""
        boxes, size = found.boxes.double().numpy(), image.shape[1::-1]
        centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2 / size, (boxes[:, 2:] - boxes[:, :2]) / size
        lines = np.column_stack((found.labels.numpy(), centres, sides, found.scores.numpy()))
        file = self.folder / "labels" / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        np.savetxt(file, lines, fmt=["%d"] + ["%.6f"] * 5)
        if origin.path is None or is_frame:
            write_png(self.folder / "images" / f"{name}.png", image)
        else:
            _link(origin.path, self.folder / "images" / f"{name}{origin.path.suffix}")

    def _write_crops(self, name: str, image: np.ndarray, found: Detections) -> None:
        for k, (box, label) in enumerate(zip(found.boxes.tolist(), found.labels.tolist(), strict=True)):
            left, top, right, bottom = map(round, box)
            crop = image[top : max(bottom, top + 1), left : max(right, left + 1)]
            if crop.size:
                # The class name may contain a slash, or be dots only, which lead to another folder.
                folder = self.class_names[label].replace("/", "_").strip(".") or "_"
                write_png(self.folder / "crops" / folder / f"{name}-{k:03d}.png", crop)


def _link(image: Path, place: Path) -> None:
    """Link to the image; copy it where the system has no links."""
    try:
        place.symlink_to(os.path.abspath(image))
    except OSError:
        shutil.copyfile(image, place)


class _Video:
    """A video being written, of frames of the first one's size; with 25 frames per second if `fps` is not positive."""

    def __init__(self, origin: Origin, path: Path, first: np.ndarray, fps: float, number: int) -> None:
        self.origin, self._size, self._last = origin, (first.shape[1], first.shape[0]), number
        fps = fps if math.isfinite(fps) and fps > 0 else 25.0
        self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, self._size)
        if not self._writer.isOpened():
            width, height = self._size
            raise UserError(f"{path}: the installed OpenCV cannot write this video of {width}x{height} pixels")

    def write(self, drawn: np.ndarray, number: int, stride: int) -> None:
        """Write frame `number`, once more for each frame of a live stream that was missed, to keep the time."""
        if (drawn.shape[1], drawn.shape[0]) != self._size:
            drawn = cv2.resize(drawn, self._size)  # a stream may change its size, and the writer drops such frames
        for _ in range(max(1, (number - self._last) // stride)):
            self._writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
        self._last = number

    def close(self) -> None:
        self._writer.release()
