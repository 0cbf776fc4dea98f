"""A detector that knows the answers, and the image set that it knows them of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.image_set import ImageSet, Record, pack
from data.problems import Problems
from models.detector import Detector
from models.yolo.postprocess import DetectionOptions
from utils.draw import write_png
from utils.structures import Detections, Placement

NAMES, IDS = ("dog", "cat"), (17, 3)  # the data set's; by label 0, 1
MODEL_NAMES = ("cat", "bird", "dog")
IMAGE_IDS = (5, 6, 7, 8)
PLACEMENT = Placement(source_hw=(60, 80), scale_x=0.5, scale_y=0.5, left_px=0.0, top_px=5.0)  # into 40 x 40
NOTHING = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long())

Units = Sequence[tuple[float, float]] | None


@dataclass(frozen=True, kw_only=True)
class FakeDetector(Detector):
    """A Detector without a network; subclasses say what it detects. asked: the units and options of each image."""

    predictor: Any = None
    class_names: tuple[str, ...] = MODEL_NAMES
    letterbox: bool = True
    options: DetectionOptions = field(default_factory=DetectionOptions)
    hw: tuple[int, int] = (40, 40)
    asked: list[tuple[tuple[float, float], DetectionOptions]] = field(default_factory=list)

    def __post_init__(self) -> None:
        pass

    @property
    def input_hw(self) -> tuple[int, int]:
        return self.hw

    @property
    def size_step_px(self) -> int:
        return 20

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def detect_batch(self, images: torch.Tensor, units_px: Units = None) -> list[Detections]:
        assert units_px is not None and len(units_px) == len(images)
        self.asked.extend((unit, self.options) for unit in units_px)
        return [self.objects(round(image[0, 20, 20].item() * 255)) for image in images]

    def objects(self, image_id: int) -> Detections:
        raise NotImplementedError


class PerfectDetector(FakeDetector):
    """Detects the objects of `known_images`, and a bird, which the data set does not know."""

    def objects(self, image_id: int) -> Detections:
        boxes, labels = objects_of(image_id)
        boxes = PLACEMENT.to_input(np.append(boxes, [[0, 0, 80, 60]], axis=0).astype(np.float32))
        labels = np.append(np.array([2, 0])[labels], 1)
        scores = torch.linspace(0.9, 0.6, len(labels))
        return Detections(boxes=torch.from_numpy(boxes).float(), scores=scores, labels=torch.from_numpy(labels))


def objects_of(image_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (M, 4) xyxy in source pixels, and labels (M,): three, and none in the last image."""
    rng = np.random.default_rng(image_id)
    corners, sides = rng.uniform(0, 20, (3, 2)), rng.uniform(8, 35, (3, 2))
    count = 0 if image_id == IMAGE_IDS[-1] else 3
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)[:count], np.array([0, 1, 0])[:count]


def known_images(folder: Path) -> ImageSet:
    """Four images of 60 x 80, each of one colour, which is its id."""
    folder.mkdir(exist_ok=True)
    records = []
    for image_id in IMAGE_IDS:
        path = folder / f"{image_id}.png"
        write_png(path, np.full((60, 80, 3), image_id, np.uint8))
        boxes, labels = objects_of(image_id)
        is_crowd = np.zeros(len(boxes), bool)
        records.append(
            Record(path=str(path), image_id=image_id, boxes=boxes, labels=labels, is_crowd=is_crowd, hw=(60, 80))
        )
    return pack(
        records,
        name="known",
        split="val",
        class_names=NAMES,
        category_ids=IDS,
        problems=Problems(),
        source=str(folder),
    )


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of the time of a small evaluation."""
    for name in ("plot_pr_curves", "plot_confusion"):
        monkeypatch.setattr(f"evaluation.evaluator.{name}", lambda *_: None)
