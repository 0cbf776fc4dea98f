"""Proof of an exported file: its AP on a split beside that of the network it was made from, and how far they differ."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from data.image_set import ImageSet
from evaluation.coco_map import CocoTable
from evaluation.evaluator import Evaluator
from models.detector import Detector
from models.predictor import Predictor
from models.yolo.postprocess import DetectionOptions
from utils.structures import Detections

# A score of 1 counts as so many pixels where the candidate nearest to another one is looked for.
_SCORE_PX = 100.0
_SLACK = 0.9  # on the confidence, so that a score on either side of it has its counterpart


@dataclass(kw_only=True)
class SideBySide:
    """A Predictor that answers as `file`, and measures on each mini-batch how `reference` differs from it.

    box_px, score: the largest differences of a candidate of the file from the reference's nearest one of its class.
    reference_s, file_s: per image, of each mini-batch.
    """

    reference: Predictor
    file: Predictor
    box_px: float = 0.0
    score: float = 0.0
    compared: int = 0
    reference_s: list[float] = field(default_factory=list)
    file_s: list[float] = field(default_factory=list)

    @property
    def plan(self) -> Any:  # a cfg.plan.Plan, which this room does not import
        return self.file.plan

    @property
    def device(self) -> torch.device:
        return self.file.device

    def check(self, options: DetectionOptions) -> None:
        self.file.check(options)

    def candidates(self, images: Tensor, *, confidence: float) -> list[Detections]:
        expected = _timed(self.reference, images, _SLACK * confidence, self.reference_s)
        found = _timed(self.file, images, confidence, self.file_s)
        for ours, theirs in zip(found, expected, strict=True):
            self._compare(ours, theirs)
        return found

    def _compare(self, found: Detections, expected: Detections) -> None:
        for label in set(found.labels.tolist()):
            ours, theirs = (each.where(each.labels == label) for each in (found, expected))
            if not len(theirs):
                continue
            left, right = (torch.cat((each.boxes, _SCORE_PX * each.scores[:, None]), dim=1) for each in (ours, theirs))
            nearest = torch.cdist(left.double(), right.double(), p=1.0).argmin(1)
            self.box_px = max(self.box_px, float((ours.boxes - theirs.boxes[nearest]).abs().max()))
            self.score = max(self.score, float((ours.scores - theirs.scores[nearest]).abs().max()))
            self.compared += len(ours)


def _timed(predictor: Predictor, images: Tensor, confidence: float, seconds: list[float]) -> list[Detections]:
    started = time.perf_counter()
    found = [each.cpu() for each in predictor.candidates(images, confidence=confidence)]
    seconds.append((time.perf_counter() - started) / len(images))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheck:
    """What the check of one file measured. The *_ms are medians per image, up to the candidates."""

    name: str
    AP: float
    AP50: float
    box_px: float
    score: float
    compared: int
    ms: float
    reference_ms: float


def check_file(
    name: str, reference: Detector, file: Detector, image_set: ImageSet, *, batch_size: int, workers: int
) -> FileCheck:
    """Evaluate the file on the image set, and compare its candidates with the reference's as it goes."""
    both = SideBySide(reference=reference.predictor, file=file.predictor)
    table = Evaluator(replace(file, predictor=both), image_set, batch_size=batch_size, workers=workers).measure()
    return FileCheck(
        name=name,
        AP=table.AP,
        AP50=table.AP50,
        box_px=both.box_px,
        score=both.score,
        compared=both.compared,
        ms=1000 * median(both.file_s),
        reference_ms=1000 * median(both.reference_s),
    )


def check_table(references: Mapping[str, CocoTable], checks: Sequence[FileCheck]) -> str:
    """Return the table of a network and its files: AP, largest differences, ms per image.

    references: by name; the first is what the files were compared with.
    """
    width = max(len(name) for name in (*references, *(check.name for check in checks)))
    lines = [f"{'':<{width}}       AP     AP50   box px     score  ms/image"]
    lines += [f"{name:<{width}}  {table.AP:7.4f}  {table.AP50:7.4f}" for name, table in references.items()]
    lines[1] += f"{median(check.reference_ms for check in checks):29.1f}"
    for each in checks:
        differences = f"{each.box_px:7.2g}  {each.score:8.1e}"
        lines.append(f"{each.name:<{width}}  {each.AP:7.4f}  {each.AP50:7.4f}  {differences}  {each.ms:8.1f}")
    return "\n".join(lines)
