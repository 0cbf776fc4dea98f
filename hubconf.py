"""torch.hub: `detector = torch.hub.load(FOLDER, "detector", weights="best.pt", source="local")` (docs/python.md)."""

from __future__ import annotations

from typing import Any

from models.detector import Detector

# What its import needs; torch.hub looks whether they are there.
dependencies = ["torch", "torchvision", "numpy", "cv2", "PIL", "safetensors"]


def detector(weights: str, **settings: Any) -> Detector:
    """Load a detector, for images given as paths, of Pillow or of numpy. weights, settings: see `Detector.load`."""
    return Detector.load(weights, **settings)
