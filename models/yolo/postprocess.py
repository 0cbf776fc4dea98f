"""RawHeads -> Detections: threshold, class-wise non-maximum suppression, the best K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from models.yolo.coder import decode_head
from models.yolo.head import RawHead
from utils.structures import Detections

# NMS is quadratic in the worst case; beyond this many candidates an image the weakest cannot matter to the
# best 100.
MAX_CANDIDATES = 30_000


@torch.no_grad()
def postprocess(
    heads: Sequence[RawHead], *, confidence: float, nms_iou: float, max_detections: int
) -> list[Detections]:
    """One Detections an image. A box may be found in several classes; score = objectness * class."""
    images = len(heads[0].logits)
    boxes = torch.cat([decode_head(head).reshape(images, -1, 4) for head in heads], dim=1)
    scores = torch.cat([_scores(head).reshape(images, -1, head.spec.classes) for head in heads], dim=1)
    return [
        _best_of_image(b, s, confidence=confidence, nms_iou=nms_iou, max_detections=max_detections)
        for b, s in zip(boxes, scores, strict=True)
    ]


def _scores(head: RawHead) -> Tensor:
    """(N, A, H, W, C)"""
    said = head.logits[..., 4:].to(torch.promote_types(head.logits.dtype, torch.float32)).sigmoid()
    return said[..., :1] * said[..., 1:]


def _best_of_image(
    boxes: Tensor, scores: Tensor, *, confidence: float, nms_iou: float, max_detections: int
) -> Detections:
    """boxes (S, 4), scores (S, C) -> Detections, best first."""
    place, label = (scores > confidence).nonzero(as_tuple=True)
    score = scores[place, label]
    if len(score) > MAX_CANDIDATES:
        score, best = score.topk(MAX_CANDIDATES)
        place, label = place[best], label[best]
    boxes = boxes[place]
    kept = _survivors(boxes, score, label, nms_iou)
    best = kept[score[kept].argsort(descending=True, stable=True)[:max_detections]]
    return Detections(boxes=boxes[best], scores=score[best], labels=label[best])


def _survivors(boxes: Tensor, scores: Tensor, labels: Tensor, nms_iou: float) -> Tensor:
    """Indices of those that no better one of their class overlaps.

    Not torchvision's batched_nms: it moves the classes apart by the largest coordinate, so that boxes which reach
    out of the picture suppress another class's, and one huge box rounds all the others.
    """
    kept = [torch.zeros_like(labels[:0])]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        kept.append(members[nms(boxes[members], scores[members], nms_iou)])
    return torch.cat(kept)
