"""A detector over an image set: how images come to it, and what it is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from data.image_set import ImageSet
from evaluation.inference import detect_batches, image_batches
from models.yolo.postprocess import DetectionOptions
from tests.evaluation.fakes import PerfectDetector, known_images
from utils.letterbox import RESIZES
from utils.structures import Detections


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return known_images(tmp_path / "images")


@pytest.mark.parametrize(("relative", "unit"), [(False, (0.5, 0.5)), (True, (40.0, 30.0))])
def test_distances_are_measured_in_source_pixels_or_in_images(images: ImageSet, relative, unit):
    detector = PerfectDetector()
    batches = image_batches(detector, images, batch_size=2, workers=0)
    pairs = list(detect_batches(detector, batches, relative=relative))
    assert [unit for unit, _ in detector.asked] == [unit] * 4
    assert [batch.image_ids for batch, _ in pairs] == [(5, 6), (7, 8)]
    assert [len(found) for _, both in pairs for found in both] == [4, 4, 4, 1]


def test_a_mosaic_cannot_be_evaluated(images: ImageSet):
    detector = PerfectDetector()
    (first, _) = image_batches(detector, images, batch_size=2, workers=0)
    with pytest.raises(AssertionError, match="whole images"):
        next(detect_batches(detector, [replace(first, placements=(None, None))]))


def test_batches_too_large_for_memory_are_detected_in_parts(images: ImageSet):
    class Small(PerfectDetector):
        def detect_batch(
            self, images: torch.Tensor, units_px: Sequence[tuple[float, float]] | None = None
        ) -> list[Detections]:
            if len(images) > 1:
                raise torch.OutOfMemoryError
            return super().detect_batch(images, units_px)

    detector = Small()
    ((_, found),) = detect_batches(detector, image_batches(detector, images, batch_size=4, workers=0))
    assert [len(each) for each in found] == [4, 4, 4, 1]


def test_images_are_resized_as_the_detectors_options_tell(images: ImageSet):
    ((as_bytes,), (as_floats,)) = (
        image_batches(PerfectDetector(options=DetectionOptions(resize=how)), images, batch_size=4, workers=0)
        for how in ("opencv", "darknet")
    )
    assert (as_bytes.images.dtype, as_floats.images.dtype) == (torch.uint8, torch.float32)
    assert as_bytes.images.shape == as_floats.images.shape == (4, 3, 40, 40)


def test_the_options_choices_of_resizing_are_the_loaders():
    choices = {each.name: each.metadata["choices"] for each in fields(DetectionOptions)}
    assert choices["resize"] == RESIZES
