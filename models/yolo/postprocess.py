"""RawHeads -> Detections: threshold, class-wise non-maximum suppression, the best K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.yolo.coder import at_least_float32, decode_head
from models.yolo.head import RawHead
from models.yolo.nms import NmsRule, survivors
from utils.structures import Detections

# NMS is quadratic in the worst case; beyond this many candidates an image the weakest are left out. They cannot
# matter to the best 100.
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
    """One Detections an image. A box may be found in several classes; score = objectness * class.

    max_detections: None keeps all that NMS leaves; it sees the best MAX_CANDIDATES of an image only. nms: a kind
    (`models.yolo.nms`), or "cfg" for what the last [yolo] says, as in darknet. units_px: per image, the (width, height)
    in input pixels of the unit in which NMS measures distances; None: input pixels.
    """
    last = heads[-1].spec
    rule = NmsRule(kind=last.nms_kind if nms == "cfg" else nms, iou=nms_iou, beta=last.beta_nms)
    found = candidates(heads, confidence=confidence)
    units_px = units_px or [(1.0, 1.0)] * len(found)
    return [
        _best_of_image(image, rule, unit_px, max_detections) for image, unit_px in zip(found, units_px, strict=True)
    ]


def candidates(heads: Sequence[RawHead], *, confidence: float) -> list[Detections]:
    """Per image all boxes and classes that score above `confidence`, before any suppression, in darknet's order:
    heads as in the file, in each the cells row by row, in each its anchors, in each its classes."""
    images = len(heads[0].logits)
    boxes = torch.cat([decode_head(head).permute(0, 2, 3, 1, 4).reshape(images, -1, 4) for head in heads], dim=1)
    scores = torch.cat([_scores(head).reshape(images, -1, head.spec.classes) for head in heads], dim=1)
    return [_above(*of_image, confidence) for of_image in zip(boxes, scores, strict=True)]


def _scores(head: RawHead) -> Tensor:
    """(N, H, W, A, C)"""
    logits = head.logits[..., 4:].permute(0, 2, 3, 1, 4)
    said = at_least_float32(logits).sigmoid()
    return said[..., :1] * said[..., 1:]


def _above(boxes: Tensor, scores: Tensor, confidence: float) -> Detections:
    """boxes (S, 4), scores (S, C)"""
    place, label = (scores > confidence).nonzero(as_tuple=True)
    return Detections(boxes=boxes[place], scores=scores[place, label], labels=label)


def _best_of_image(
    found: Detections, rule: NmsRule, unit_px: tuple[float, float], max_detections: int | None
) -> Detections:
    """Best first."""
    if len(found) > MAX_CANDIDATES:
        found = found.where(found.scores.topk(MAX_CANDIDATES).indices)
    found = found.where(survivors(found.boxes, found.scores, found.labels, rule, unit=unit_px))
    return found.where(found.scores.argsort(descending=True, stable=True)[:max_detections])
