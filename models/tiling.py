"""Detection in large images: in overlapping tiles, and in the whole image for what is larger than a tile sees.

An object up to the size of the overlap lies whole in some tile. So a piece of an object, cut by its tile's edge, is
dropped if it is shorter than the overlap, and otherwise merged with its other pieces unless the whole was found, too.
A box is cut if it ends at the edge; if it ends near it, too, where another tile shows that its object goes on there.
Akyon et al. 2022, "Slicing Aided Hyper Inference", arXiv:2202.06934, merges all boxes that overlap instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.yolo.nms import NmsRule, classwise_nms
from utils.boxes import elementwise_iou, share_inside
from utils.knob import knob
from utils.structures import Detections

DetectAll = Callable[[Sequence[np.ndarray]], list[Detections]]
_AT_ONCE = 8  # tiles in a forward
_EDGE_SHARE = 0.01  # of a tile: a box that ends so close to its edge is cut
_NEAR_SHARE = 0.05  # of a tile: so far from the edge a box of a piece may end
_MOST_PIECES = 1000  # the strongest; they are compared pair by pair
_COVERED = 0.5  # a piece with this share inside a whole object's box is a piece of it


@dataclass(frozen=True, kw_only=True, slots=True)
class TilingOptions:
    """How large images are divided."""

    tile: int | None = knob(
        None, "detect in overlapping square tiles of this side as well as in the whole image", unit="PX", low=32
    )
    tile_overlap: float = knob(
        0.2, "with tile: overlap of neighbours, as a share of the tile; more than the objects' size", low=0, high=0.9
    )


def tiles_of(hw: tuple[int, int], options: TilingOptions) -> Tensor:
    """Return tiles (T, 4) int64 xyxy that cover an image of this size; neighbours overlap by `tile_overlap` or more."""
    assert options.tile is not None
    starts = [_starts(length_px, options.tile, overlap_px(options)) for length_px in hw]
    return torch.tensor(
        [(x, y, min(x + options.tile, hw[1]), min(y + options.tile, hw[0])) for y in starts[0] for x in starts[1]]
    )


def overlap_px(options: TilingOptions) -> int:
    assert options.tile is not None
    return int(options.tile * options.tile_overlap)


def _starts(length_px: int, tile_px: int, overlap: int) -> list[int]:
    """Return the first pixels of the tiles along one side, evenly spaced."""
    steps = max(0, -(-(length_px - tile_px) // (tile_px - overlap)))
    return [step * (length_px - tile_px) // steps for step in range(steps + 1)] if steps else [0]


def detect_tiled(detect: DetectAll, image: np.ndarray, options: TilingOptions, iou: float) -> Detections:
    """Detect in the image (H, W, 3) and, if it is larger than a tile, in its tiles. Returns boxes in its pixels.

    iou: boxes of one class from different tiles that overlap more are one object.
    """
    hw = image.shape[:2]
    (whole,) = detect([image])
    tiles = tiles_of(hw, options)
    if len(tiles) == 1:
        return whole
    # What is small is seen better in tiles, and would be kept twice where its coarse box lies a bit aside.
    found = [whole.where((whole.boxes[:, 2:] - whole.boxes[:, :2]).amax(1) > overlap_px(options) / 2)]
    for first in range(0, len(tiles), _AT_ONCE):
        chunk = tiles[first : first + _AT_ONCE]
        seen = detect([image[top:bottom, left:right] for left, top, right, bottom in chunk.tolist()])
        found += [replace(each, boxes=each.boxes + tile[:2].repeat(2)) for each, tile in zip(seen, chunk, strict=True)]
    windows = torch.cat([torch.tensor([[0, 0, hw[1], hw[0]]]), tiles])
    window = windows.repeat_interleave(torch.tensor([len(each) for each in found]), dim=0).float()
    return merge(_together(found), window, hw, overlap_px(options), iou)


def merge(found: Detections, window: Tensor, hw: tuple[int, int], overlap: int, iou: float) -> Detections:
    """Make one detection of each object's, best first. window: (K, 4) xyxy, the tile each detection was made in."""
    image = found.boxes.new_tensor([0, 0, hw[1], hw[0]])
    gap = (found.boxes - window).abs().where(window != image, torch.inf)  # (K, 4), but not to the image's own edges
    side = (window[:, 2:] - window[:, :2]).amax(1, keepdim=True)
    is_near = gap <= _NEAR_SHARE * side
    is_cut = (gap <= (_EDGE_SHARE * side).clamp(min=1)) | (is_near & _goes_on(found, window, is_near, iou))
    is_cut_along = is_cut[:, :2] | is_cut[:, 2:]  # (K, 2): x, y
    missing = gap.where(is_cut, 0)
    length = found.boxes[:, 2:] - found.boxes[:, :2] + missing[:, :2] + missing[:, 2:]  # up to the tile's edge
    is_short = is_cut_along & (length <= overlap)
    is_piece = is_cut_along.any(1)
    whole = _best(found.where(~is_piece), iou)
    long = is_piece & ~is_short.any(1)
    joined = _join(found.where(long), window[long], iou)
    inside = share_inside(joined.boxes, whole.boxes) > _COVERED
    is_new = ~(inside & (joined.labels[:, None] == whole.labels)).any(1)
    return _best(_together([whole, joined.where(is_new)]), iou)


def _goes_on(found: Detections, window: Tensor, is_near: Tensor, iou: float) -> Tensor:
    """Return (K, 4) whether an object goes on beyond this edge of its tile, of those with an edge that `is_near`.

    It does if another tile has a box of its class that reaches beyond, and they agree about what lies in this one.
    """
    goes_on = torch.zeros_like(is_near)
    for tile in torch.unique(window[is_near.any(1)], dim=0):
        beyond = torch.cat([found.boxes[:, :2] < tile[:2], found.boxes[:, 2:] > tile[2:]], dim=1)
        own, others = (is_near.any(1) & (window == tile).all(1)).nonzero()[:, 0], beyond.any(1).nonzero()[:, 0]
        seen = found.boxes[others].clamp(min=tile[:2].repeat(2), max=tile[2:].repeat(2))
        agree = elementwise_iou(found.boxes[own][:, None], seen) > iou
        agree &= found.labels[own][:, None] == found.labels[others]
        goes_on[own] = (agree[..., None] & beyond[others]).any(1)
    return goes_on


def _join(pieces: Detections, window: Tensor, iou: float) -> Detections:
    """Unite the pieces of each object: those of one class that agree about the region that both their tiles see."""
    if len(pieces) == 0:
        return pieces
    strongest = pieces.scores.argsort(descending=True, stable=True)[:_MOST_PIECES]
    pieces, window = pieces.where(strongest), window[strongest]
    first = torch.maximum(pieces.boxes[:, None, :2], window[None, :, :2])
    last = torch.minimum(pieces.boxes[:, None, 2:], window[None, :, 2:]).maximum(first)
    seen = torch.cat([first, last], dim=2)  # (K, K, 4): of each piece, what lies inside the other's tile
    agree = (elementwise_iou(seen, seen.transpose(0, 1)) > iou) & (pieces.labels[:, None] == pieces.labels)
    linked = agree & (window[:, None] != window).any(2) | torch.eye(len(pieces), dtype=torch.bool)
    while not torch.equal(linked, further := linked.float() @ linked.float() > 0):  # an object may have many pieces
        linked = further
    boxes = pieces.boxes.expand(len(pieces), -1, -1)
    corners = [
        boxes[..., :2].where(linked[..., None], torch.inf).amin(1),
        boxes[..., 2:].where(linked[..., None], -torch.inf).amax(1),
    ]
    united = Detections(boxes=torch.cat(corners, dim=1), scores=pieces.scores, labels=pieces.labels)
    return united.where(linked.int().argmax(1) == torch.arange(len(pieces)))  # once each, with the best score


def _best(found: Detections, iou: float) -> Detections:
    rule = NmsRule(kind="default", iou=iou)
    kept = found.where(classwise_nms(found.boxes, found.scores, found.labels, rule))
    return kept.where(kept.scores.argsort(descending=True, stable=True))


def _together(parts: Sequence[Detections]) -> Detections:
    return Detections(
        boxes=torch.cat([part.boxes for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
    )
