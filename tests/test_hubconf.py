"""The door by torch.hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models.detector import Detector
from models.yolo.postprocess import DetectionOptions
from tests.models.checkpoint_file import write_checkpoint


def test_torch_hub_loads_what_detector_load_does(root: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "best.pt")
    weights, settings = str(tmp_path / "best.pt"), {"device": "cpu", "options": DetectionOptions(confidence=0.003)}
    detector = torch.hub.load(str(root), "detector", weights=weights, source="local", **settings)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    found, expected = detector(image), Detector.load(weights, **settings)(image)
    assert len(found) > 0
    np.testing.assert_array_equal(found.boxes, expected.boxes)
