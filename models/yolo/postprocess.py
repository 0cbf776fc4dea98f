"""Raw heads -> Detections: score threshold, class-wise non-maximum suppression, the best K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.yolo.coder import at_least_float32, decode_head
from models.yolo.head import RawHead
from models.yolo.nms import NmsRule, classwise_nms
from utils.structures import Detections

# NMS is quadratic in the worst case, so the weakest candidates of an image beyond this number are dropped. They cannot
# be among the best 100.
MAX_CANDIDATES = 30_000


@torch.no_grad()
def postprocess(
    heads: Sequence[RawHead],
    *,
    confidence: float,
    nms_iou: float,
    max_detections: int | None,
    nms: str = "cfg",
    units_px: Sequence[tuple[float, float]] | None = None,
) -> list[Detections]:
    """Return one Detections per image. A box may be detected in several classes; score = objectness * class.

    max_detections: None keeps all that NMS keeps of the best MAX_CANDIDATES. nms: a kind (`models.yolo.nms`), or "cfg"
    for that of the last [yolo], as in darknet. units_px: per image, the (width, height) in input pixels of the unit in
    which NMS measures distances; None: input pixels.
    """
    last = heads[-1].spec
    rule = NmsRule(kind=last.nms_kind if nms == "cfg" else nms, iou=nms_iou, beta=last.beta_nms)
    images = candidates(heads, confidence=confidence)
    units_px = units_px or [(1.0, 1.0)] * len(images)
    return [_best(image, rule, unit_px, max_detections) for image, unit_px in zip(images, units_px, strict=True)]


def candidates(heads: Sequence[RawHead], *, confidence: float) -> list[Detections]:
    """Return per image all boxes and classes that score above `confidence`, before suppression, in darknet's order:
    by head, row, column, anchor, class."""
    images = len(heads[0].logits)
    boxes = torch.cat([decode_head(head).permute(0, 2, 3, 1, 4).reshape(images, -1, 4) for head in heads], dim=1)
    scores = torch.cat([_scores(head).reshape(images, -1, head.spec.classes) for head in heads], dim=1)
    return [_above(*of_image, confidence) for of_image in zip(boxes, scores, strict=True)]


def _scores(head: RawHead) -> Tensor:
    """Return (N, H, W, A, C)."""
    logits = head.logits[..., 4:].permute(0, 2, 3, 1, 4)
    probabilities = at_least_float32(logits).sigmoid()
    return probabilities[..., :1] * probabilities[..., 1:]


def _above(boxes: Tensor, scores: Tensor, confidence: float) -> Detections:
    """boxes (S, 4), scores (S, C)"""
    index, label = (scores > confidence).nonzero(as_tuple=True)
    return Detections(boxes=boxes[index], scores=scores[index, label], labels=label)


def _best(found: Detections, rule: NmsRule, unit_px: tuple[float, float], max_detections: int | None) -> Detections:
    """Suppress the candidates of one image, and return the best of those kept, best first."""
    if len(found) > MAX_CANDIDATES:
        found = found.where(found.scores.topk(MAX_CANDIDATES).indices)
    found = found.where(classwise_nms(found.boxes, found.scores, found.labels, rule, unit=unit_px))
    return found.where(found.scores.argsort(descending=True, stable=True)[:max_detections])
