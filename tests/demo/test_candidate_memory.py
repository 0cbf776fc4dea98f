"""What a detector finds with kept candidates is what it finds without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from demo.candidate_memory import CandidateMemory
from models.detector import Detector
from models.predictor import Predictor
from models.yolo.postprocess import DrawnDetectionOptions
from tests.models.checkpoint_file import write_checkpoint
from utils.structures import Detections

FLOOR = 0.002


class Counting:
    """A predictor that counts the images it has seen."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.images = predictor, 0
        self.plan, self.device, self.check = predictor.plan, predictor.device, predictor.check

    def candidates(self, images: Tensor, *, confidence: float) -> list[Detections]:
        self.images += len(images)
        return self.predictor.candidates(images, confidence=confidence)


@pytest.fixture
def plain(tmp_path: Path) -> Detector:
    write_checkpoint(tmp_path / "best.pt")
    detector = Detector.load(tmp_path / "best.pt", device="cpu", options=DrawnDetectionOptions(confidence=FLOOR))
    return replace(detector, predictor=Counting(detector.predictor))


@pytest.fixture
def keeping(plain: Detector) -> Detector:
    return replace(plain, predictor=CandidateMemory(plain.predictor, FLOOR))


def an_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize("nms_iou", [0.0, 0.45, 1.0])
@pytest.mark.parametrize("max_detections", [5, None])
def test_every_threshold_gives_what_the_network_would(plain, keeping, nms_iou, max_detections):
    plain, keeping = (each.with_options(max_detections=max_detections) for each in (plain, keeping))
    image, counts = an_image(0), []
    scores = plain.with_options(max_detections=None)(image, nms_iou=1.0).scores
    # Some equal to a score, and not in order.
    thresholds = [float(np.quantile(scores, share, method="nearest")) for share in (0.5, 0.2, 1.0, 0.0, 0.9)]
    for confidence in thresholds:
        expected = plain(image, confidence=confidence, nms_iou=nms_iou)
        found = keeping(image, confidence=confidence, nms_iou=nms_iou)
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        counts.append(len(found))
    assert counts[2] == 0 and max(counts) > 3
    assert plain.predictor.images == 1 + len(thresholds) + 1


def test_the_network_runs_once_an_image(plain, keeping):
    images = [an_image(seed) for seed in range(3)]
    first = [keeping(image) for image in images]
    again = [keeping(image, nms_iou=0.45) for image in images]
    assert plain.predictor.images == 3
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
    assert not np.array_equal(first[0].boxes, first[1].boxes)


def test_only_the_last_images_are_kept(plain, keeping):
    for seed in range(20):
        keeping(an_image(seed))
    keeping(an_image(19))
    assert plain.predictor.images == 20
    keeping(an_image(0))
    assert plain.predictor.images == 21
    assert len(keeping.predictor._kept) == 8


def test_threads_share_it(plain, keeping):
    images = [an_image(seed % 3) for seed in range(12)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(keeping, images))
    for image, each in zip(images, found, strict=True):
        np.testing.assert_array_equal(each.boxes, plain(image).boxes)


def test_what_is_kept_does_not_change(keeping):
    pixels = torch.rand(1, 3, *keeping.input_hw, generator=torch.Generator().manual_seed(0))
    (first,) = keeping.predictor.candidates(pixels, confidence=FLOOR)
    first.scores.zero_()
    (again,) = keeping.predictor.candidates(pixels, confidence=FLOOR)
    assert len(again) and (again.scores > FLOOR).all()
