"""One image through a detector, which records what its network is called with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.yolo.postprocess import DetectionOptions
from tests.evaluation.fakes import FakeDetector, Units
from utils.letterbox import as_input
from utils.structures import Detections


class TwoBoxes(FakeDetector):
    """A box in the middle of the input, and one in its first columns."""

    def detect_batch(self, images: torch.Tensor, units_px: Units = None) -> list[Detections]:
        calls.append((images, units_px))
        boxes = torch.tensor([[32.0, 16, 64, 48], [0, 0, 8, 64]])
        return [Detections(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 0]))]


calls: list[tuple[torch.Tensor, Units]] = []


@pytest.mark.parametrize("resize", ["opencv", "darknet"])
@pytest.mark.parametrize(
    ("letterbox", "unit", "boxes"),
    [
        (False, (96.0, 64.0), [[20, 15, 40, 45], [0, 0, 5, 60]]),
        (True, (64.0, 64.0), [[15, 15, 45, 45]]),  # the other lies wholly in the border
    ],
)
def test_boxes_come_back_in_the_images_pixels(letterbox, unit, boxes, resize) -> None:  # type: ignore[no-untyped-def]
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    calls.clear()
    detector = TwoBoxes(letterbox=letterbox, options=DetectionOptions(resize=resize), hw=(64, 96))
    (found,) = detector.detect([image])
    expected = torch.tensor(boxes, dtype=torch.float32)
    torch.testing.assert_close(found.boxes, expected)
    ((pixels, units_px),) = calls
    assert units_px == [pytest.approx(unit)]
    laid, _ = as_input(image, (64, 96), letterbox=letterbox, how=resize)
    assert pixels.dtype == torch.float32
    expected_pixels = laid if resize == "darknet" else laid.astype(np.float32) / 255
    torch.testing.assert_close(pixels[0].permute(1, 2, 0), torch.from_numpy(expected_pixels))
