"""Candidates that are kept, so that a moved threshold does not run the network again."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from cfg.plan import Plan
from models.predictor import Predictor
from models.yolo.postprocess import DetectionOptions
from utils.structures import Detections

_IMAGES = 8  # kept


class CandidateMemory:
    """A predictor that keeps another's candidates of the last images, down to the score `floor`.

    Suppression follows as ever, by the thresholds of each call, so what is found is the same.
    """

    def __init__(self, predictor: Predictor, floor: float) -> None:
        self.predictor, self.floor = predictor, floor
        self._kept: dict[bytes, list[Detections]] = {}

    @property
    def plan(self) -> Plan:
        return self.predictor.plan

    @property
    def device(self) -> torch.device:
        return self.predictor.device

    def check(self, options: DetectionOptions) -> None:
        self.predictor.check(options)

    def candidates(self, images: Tensor, *, confidence: float) -> list[Detections]:
        """Return per image what the other predictor does for a `confidence` of `floor` or above."""
        key = blake2b(images.cpu().numpy().tobytes()).digest()
        found = self._kept.get(key)
        if found is None:
            found = self.predictor.candidates(images, confidence=self.floor)
            # A new dictionary: another thread may be reading the old one.
            self._kept = {**dict(list(self._kept.items())[1 - _IMAGES :]), key: found}
        return [each.where(each.scores > confidence) for each in found]
