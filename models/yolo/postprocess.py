"""Raw heads -> candidates, by a score threshold -> Detections, by class-wise non-maximum suppression: the best K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cfg.yolo import NMS_KINDS, YoloSpec
from models.yolo.coder import anchor_grid, at_least_float32, decode
from models.yolo.head import RawHead
from models.yolo.nms import NmsRule, classwise_nms
from utils.knob import knob
from utils.structures import Detections

# NMS is quadratic in the worst case, so the weakest candidates of an image beyond this number are dropped. They cannot
# be among the best 100.
MAX_CANDIDATES = 30_000
FIRST_CANDIDATES = 5  # times the detections asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionOptions:
    """How an image becomes the network's input, and which of its predictions are detections. Defaults: COCO's AP."""

    resize: str = knob(
        "opencv",
        "how an image becomes the network's input: OpenCV, which averages where it shrinks, or darknet's own bilinear",
        choices=("opencv", "darknet"),  # utils.letterbox.RESIZES
    )
    nms: str = knob(
        "cfg",
        "overlap of two boxes: default = IoU; greedynms, diounms = less a share for their centres' distance; cfg = "
        "what the network's last [yolo] specifies",
        choices=("cfg", *NMS_KINDS),
    )
    confidence: float = knob(0.001, "drop detections below this score", low=0, high=1)
    nms_iou: float = knob(
        0.6, "of two boxes of a class that overlap more than this, suppress the one with the lower score", low=0, high=1
    )
    max_detections: int | None = knob(100, "keep this many per image, best first; COCO scores 100", unit="N", low=1)


def _default(name: str, value: Any) -> Any:
    """Return a knob of DetectionOptions with another default."""
    return field(default=value, metadata=DetectionOptions.__dataclass_fields__[name].metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnDetectionOptions(DetectionOptions):
    """DetectionOptions with defaults for people to look at."""

    confidence: float = knob(
        0.25, "drop detections below this score (default: the file's, by class, else 0.25)", low=0, high=1
    )
    nms_iou: float = _default("nms_iou", 0.45)
    max_detections: int | None = _default("max_detections", 300)


def candidates(heads: Sequence[RawHead], *, confidence: float) -> list[Detections]:
    """Return per image all boxes and classes that score above `confidence`, before suppression, in darknet's order:
    by head, row, column, anchor, class. A box may be detected in several classes; score = objectness * class."""
    found = [_candidates(head, confidence) for head in heads]
    return [_join(parts) for parts in zip(*found, strict=True)]


def suppress(
    images: Sequence[Detections],
    last: YoloSpec,
    options: DetectionOptions,
    units_px: Sequence[tuple[float, float]] | None = None,
) -> list[Detections]:
    """Return per image the best of its candidates that non-maximum suppression keeps, best first.

    last: the network's last [yolo], which specifies nms=cfg. max_detections=None keeps all that NMS keeps of the best
    MAX_CANDIDATES. units_px: per image, the (width, height) in input pixels of the unit in which NMS measures
    distances; None: input pixels.
    """
    kind = last.nms_kind if options.nms == "cfg" else options.nms
    rule = NmsRule(kind=kind, iou=options.nms_iou, beta=last.beta_nms)
    units_px = units_px or [(1.0, 1.0)] * len(images)
    return [_best(found, rule, unit, options.max_detections) for found, unit in zip(images, units_px, strict=True)]


def _candidates(head: RawHead, confidence: float) -> list[Detections]:
    """Return the candidates of a head per image. Only cells of likely objects are decoded: no score is above its
    objectness."""
    logits = head.logits.permute(0, 2, 3, 1, 4)  # (N, H, W, A, 5 + C)
    is_likely = at_least_float32(logits[..., 4]).sigmoid() > confidence
    cells = at_least_float32(logits[is_likely])
    grid = anchor_grid([head], cells.dtype).view(*head.logits.shape[1:4], -1).permute(1, 2, 0, 3)
    boxes = decode(cells[:, :4], grid.expand(*logits.shape[:4], -1)[is_likely], new_coords=head.spec.new_coords)
    probabilities = cells[:, 4:].sigmoid()
    scores = probabilities[:, :1] * probabilities[:, 1:]
    parts = is_likely.flatten(1).sum(1).tolist()  # cells per image
    found = []
    for box, score in zip(torch.split(boxes, parts), torch.split(scores, parts), strict=True):
        index, label = (score > confidence).nonzero(as_tuple=True)
        found.append(Detections(boxes=box[index], scores=score[index, label], labels=label))
    return found


def _join(parts: Sequence[Detections]) -> Detections:
    columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels"))
    return Detections(**dict(zip(("boxes", "scores", "labels"), columns, strict=True)))


def _best(found: Detections, rule: NmsRule, unit_px: tuple[float, float], max_detections: int | None) -> Detections:
    """Suppress the candidates of one image, and return the best of those kept, best first."""
    if len(found) > MAX_CANDIDATES:
        found = found.where(found.scores.topk(MAX_CANDIDATES).indices)
    for strongest in _strongest(found, max_detections):
        kept = strongest.where(classwise_nms(strongest.boxes, strongest.scores, strongest.labels, rule, unit=unit_px))
        if max_detections is not None and len(kept) >= max_detections:
            break
    return kept.where(kept.scores.argsort(descending=True, stable=True)[:max_detections])


def _strongest(found: Detections, max_detections: int | None) -> Iterator[Detections]:
    """Yield the strongest candidates, then more, in the end all: only stronger ones decide whether a box is kept.

    A network at the start of its training has thousands of candidates in an image, of which hundreds are enough.
    """
    if max_detections is not None:
        falling, count = found.scores.sort(descending=True).values, FIRST_CANDIDATES * max_detections
        while count < len(found):
            yield found.where(found.scores >= falling[count - 1])  # with all that are equal to the last
            count *= FIRST_CANDIDATES
    yield found
