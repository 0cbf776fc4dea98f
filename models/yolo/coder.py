"""Raw (tx, ty, tw, th) <-> boxes; encode stands beside decode and undoes it.

YOLOv3/v4 (Redmon & Farhadi 2018, section 2.1; scale_x_y: YOLOv4 section 3.4):
    centre = (cell + s * sigmoid(t) - (s - 1) / 2) * stride,   size = anchor * exp(t)
Scaled-YOLOv4 (`new_coords=1`): size = anchor * (2 * sigmoid(t))^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.yolo.anchor_grid import Places, places_of
from models.yolo.head import RawHead

# exp(8) is 2981 anchors wide: no real box, but finite, so that one wild logit cannot poison a loss.
MAX_LOG_SIZE = 8.0
# And no smaller than that share of an anchor: the sides of a box must survive rounding, or CIoU divides 0 by 0.
MIN_SIZE = math.exp(-MAX_LOG_SIZE)


def decode(raw: Tensor, at: Places) -> Tensor:
    """raw (..., 4) -> (..., 4) xyxy in input pixels."""
    offset = raw[..., :2].sigmoid() * at.scale - (at.scale - 1) / 2
    centre = (at.cells + offset) * at.stride_px
    extent = raw[..., 2:4]
    ratio = (2 * extent.sigmoid()).square() if at.new_coords else extent.clamp(max=MAX_LOG_SIZE).exp()
    half = at.anchors_px * ratio.clamp(min=MIN_SIZE) / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def encode(boxes: Tensor, at: Places) -> Tensor:
    """boxes (..., 4) xyxy in input pixels -> raw (..., 4), such that decode(encode(boxes)) = boxes.

    Where no finite logit exists (a centre on the edge of what the cell can reach, a size of 4 anchors or more
    with new_coords) the nearest reachable box is encoded.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:4]) / 2, boxes[..., 2:4] - boxes[..., :2]
    offset = (centre / at.stride_px - at.cells + (at.scale - 1) / 2) / at.scale
    tiny = 1e-6
    position = offset.clamp(tiny, 1 - tiny).logit()
    ratio = (size / at.anchors_px).clamp(min=tiny)
    extent = (ratio.sqrt() / 2).clamp(tiny, 1 - tiny).logit() if at.new_coords else ratio.log()
    return torch.cat((position, extent), dim=-1)


def decode_head(head: RawHead) -> Tensor:
    """All boxes of a head: (N, A, H, W, 4) xyxy in input pixels, float32 at least."""
    raw = at_least_float32(head.logits[..., :4])
    return decode(raw.flatten(1, 3), places_of([head], raw.dtype)).view(raw.shape)


def at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
