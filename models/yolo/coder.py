"""Raw predictions (tx, ty, tw, th) <-> boxes: `decode`, and its inverse `encode`.

YOLOv3/v4 (Redmon & Farhadi 2018, section 2.1; scale_x_y: YOLOv4 section 3.4):
    centre = (cell + s * sigmoid(t) - (s - 1) / 2) * stride,   size = anchor * exp(t)
Scaled-YOLOv4 (`new_coords=1`): size = anchor * (2 * sigmoid(t))^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.yolo.anchor_grid import AnchorGrid, anchor_grid
from models.yolo.head import RawHead

# exp(8) is 2981 anchor widths: no real box, but finite, so that one wild logit cannot poison a loss.
MAX_LOG_SIZE = 8.0
# The smallest size as a share of the anchor: sides must survive rounding, or CIoU divides 0 by 0.
MIN_SIZE = math.exp(-MAX_LOG_SIZE)


def decode(logits: Tensor, grid: AnchorGrid) -> Tensor:
    """logits (..., 4) -> boxes (..., 4) xyxy in input pixels."""
    offset = logits[..., :2].sigmoid() * grid.scale - (grid.scale - 1) / 2
    centre = (grid.cells + offset) * grid.stride_px
    size = logits[..., 2:4]
    ratio = (2 * size.sigmoid()).square() if grid.new_coords else size.clamp(max=MAX_LOG_SIZE).exp()
    half = grid.anchors_px * ratio.clamp(min=MIN_SIZE) / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def encode(boxes: Tensor, grid: AnchorGrid) -> Tensor:
    """boxes (..., 4) xyxy in input pixels -> logits (..., 4), such that decode(encode(boxes)) = boxes.

    Where no finite logit exists (a centre on the edge of what the cell can reach, a size of 4 anchors or more
    with new_coords) the nearest reachable box is encoded.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:4]) / 2, boxes[..., 2:4] - boxes[..., :2]
    offset = (centre / grid.stride_px - grid.cells + (grid.scale - 1) / 2) / grid.scale
    tiny = 1e-6
    position = offset.clamp(tiny, 1 - tiny).logit()
    ratio = (size / grid.anchors_px).clamp(min=tiny)
    extent = (ratio.sqrt() / 2).clamp(tiny, 1 - tiny).logit() if grid.new_coords else ratio.log()
    return torch.cat((position, extent), dim=-1)


def decode_head(head: RawHead) -> Tensor:
    """Return all boxes of a head: (N, A, H, W, 4) xyxy in input pixels, float32 at least."""
    logits = at_least_float32(head.logits[..., :4])
    return decode(logits.flatten(1, 3), anchor_grid([head], logits.dtype)).view(logits.shape)


def at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
