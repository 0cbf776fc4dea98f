"""Output files of detection: annotated copies, and optionally json, label files and crops of the objects."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.draw import draw_boxes, write_png
from utils.errors import UserError
from utils.structures import Detections


class DetectionFiles:
    """A folder with an annotated copy of each image or video added; a context manager.

    Images of the same name from different folders get a number, so that none overwrites another.
    """

    def __init__(
        self, folder: Path, class_names: tuple[str, ...], *, save_json: bool, save_txt: bool, save_crops: bool
    ) -> None:
        self.folder, self.class_names = folder, class_names
        self.save_json, self.save_txt, self.save_crops = save_json, save_txt, save_crops
        self.written = 0
        self._rows: list[dict[str, Any]] = []
        self._names: dict[Path, str] = {}
        self._video: tuple[Path, cv2.VideoWriter, tuple[int, int]] | None = None  # file, writer, (width, height)
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> DetectionFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_video()
        if self.save_json:
            (self.folder / "detections.json").write_text(json.dumps(self._rows, indent=1))

    def add(self, path: Path, image: np.ndarray, found: Detections, *, number: int, video_fps: float | None) -> None:
        """Write the files of one image, (H, W, 3) uint8 RGB, or of frame `number` of a video; boxes in its pixels."""
        boxes, labels, scores = found.boxes.double().numpy(), found.labels.numpy(), found.scores.numpy()
        drawn = draw_boxes(image, boxes, labels, self.class_names, scores)
        name = self._name_of(path)
        if video_fps is None:
            write_png(self.folder / f"{name}.png", drawn)
        else:
            self._write_frame(path, name, drawn, video_fps)
            name = f"{name}-{number:06d}"
        self.written += 1
        if self.save_json:
            self._add_row(path, image, found, number)
        if self.save_txt:  # darknet's label lines, with the score as a sixth number
            size = image.shape[1::-1]
            centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2 / size, (boxes[:, 2:] - boxes[:, :2]) / size
            (self.folder / "labels").mkdir(exist_ok=True)
            lines = np.column_stack((labels, centres, sides, scores))
            np.savetxt(self.folder / "labels" / f"{name}.txt", lines, fmt=["%d"] + ["%.6f"] * 5)
        if self.save_crops:
            self._write_crops(name, image, found)

    def _name_of(self, path: Path) -> str:
        if path not in self._names:
            taken = set(self._names.values())
            names = (path.stem if n == 1 else f"{path.stem}-{n}" for n in range(1, len(taken) + 2))
            self._names[path] = next(name for name in names if name not in taken)
        return self._names[path]

    def _write_frame(self, path: Path, name: str, drawn: np.ndarray, fps: float) -> None:
        if self._video is None or self._video[0] != path:
            self._close_video()
            self._video = (path, *_open_video(self.folder / f"{name}.mp4", drawn, fps))
        _, writer, size = self._video
        if (drawn.shape[1], drawn.shape[0]) != size:
            drawn = cv2.resize(drawn, size)  # a stream may change its size, and the writer drops such frames
        writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))

    def _close_video(self) -> None:
        if self._video is not None:
            self._video[1].release()
            self._video = None

    def _add_row(self, path: Path, image: np.ndarray, found: Detections, number: int) -> None:
        """Add the image's entry in detections.json; bbox is x, y, width, height in pixels."""
        objects = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        rows = [
            {
                "class": self.class_names[label],
                "score": round(score, 6),
                "bbox": [round(v, 3) for v in (left, top, right - left, bottom - top)],
            }
            for (left, top, right, bottom), score, label in objects
        ]
        height, width = image.shape[:2]
        self._rows.append({"file": str(path), "frame": number, "width": width, "height": height, "objects": rows})

    def _write_crops(self, name: str, image: np.ndarray, found: Detections) -> None:
        for k, (box, label) in enumerate(zip(found.boxes.tolist(), found.labels.tolist(), strict=True)):
            left, top, right, bottom = map(round, box)
            crop = image[top : max(bottom, top + 1), left : max(right, left + 1)]
            if crop.size:
                # The class name may contain a slash.
                folder = self.folder / "crops" / self.class_names[label].replace("/", "_")
                write_png(folder / f"{name}-{k:03d}.png", crop)


def _open_video(path: Path, first: np.ndarray, fps: float) -> tuple[cv2.VideoWriter, tuple[int, int]]:
    """Return a writer for frames of the first one's size, and that (width, height); 25 fps if `fps` is not positive."""
    size = (first.shape[1], first.shape[0])
    fps = fps if math.isfinite(fps) and fps > 0 else 25.0
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise UserError(f"{path}: the installed OpenCV cannot write this video of {size[0]}x{size[1]} pixels")
    return writer, size
