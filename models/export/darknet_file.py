"""darknet's files, run by OpenCV's dnn as proof that another program reads them (`models/weights/` writes them)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from cfg.edit import with_values
from cfg.plan import load_plan
from models.export.metadata import Metadata
from utils.errors import UserError
from utils.listing import read_lines


def why_not_run() -> str:
    """Return why the OpenCV that is installed cannot run darknet's files, or "" if it can."""
    if hasattr(cv2.dnn, "readNetFromDarknet"):
        return ""
    return f"OpenCV {cv2.__version__} does not read darknet's files, 4.x does"


def open_darknet(path: Path) -> tuple[Metadata, Callable[[np.ndarray], list[np.ndarray]]]:
    """Open a .weights file with the .cfg and .names beside it, for `--check`. Raises UserError."""
    if why := why_not_run():
        raise UserError(f"{path}: {why}")
    plan = load_plan(str(path.with_suffix(".cfg")))
    metadata = Metadata(
        cfg_name=plan.name,
        cfg_text=plan.source_text,
        class_names=tuple(read_lines(path.with_suffix(".names"))),
        input_hw=plan.net.input_hw,
        letterbox=plan.net.letter_box,
        resize="opencv",
        norm="bn",
        outputs="decoded",
        precision="float32",
        batch=1,
    )
    # OpenCV makes scores below a [yolo]'s thresh, by default 0.2, 0; darknet knows no such key.
    text = with_values(plan.source_text, {plan.nodes[index].line: {"thresh": 0} for index in plan.heads})
    try:
        files = [np.frombuffer(content, np.uint8) for content in (text.encode(), path.read_bytes())]
        net = cv2.dnn.readNetFromDarknet(*files)  # type: ignore[attr-defined]  # OpenCV 4's
    except cv2.error as error:
        raise UserError(f"{path}: OpenCV cannot open it: {' '.join(str(error).split())}") from error
    names, (height, width) = [f"yolo_{index}" for index in plan.heads], plan.net.input_hw

    def run(images: np.ndarray) -> list[np.ndarray]:
        net.setInput(images)
        rows = np.concatenate(net.forward(names))  # (S, 4 + 1 + C): centre and size in 0..1, objectness, scores
        half = rows[:, 2:4] / 2
        boxes = np.hstack((rows[:, :2] - half, rows[:, :2] + half)) * np.array([width, height] * 2, np.float32)
        return [np.hstack((boxes, np.ones_like(rows[:, :1]), rows[:, 5:]))[None]]  # a score has its objectness in it

    return metadata, run
