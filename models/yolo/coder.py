"""Raw (tx, ty, tw, th) <-> boxes; encode stands beside decode and undoes it.

YOLOv3/v4 (Redmon & Farhadi 2018, section 2.1; scale_x_y: YOLOv4 section 3.4):
    centre = (cell + s * sigmoid(t) - (s - 1) / 2) * stride,   size = anchor * exp(t)
Scaled-YOLOv4 (`new_coords=1`): size = anchor * (2 * sigmoid(t))^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cfg.layers import YoloSpec
from models.yolo.head import RawHead
from utils.transfer import constant

# exp(8) is 2981 anchors wide: no real box, but finite, so that one wild logit cannot poison a loss.
MAX_LOG_SIZE = 8.0
# And no smaller than that share of an anchor: the sides of a box must survive rounding, or CIoU divides 0 by 0.
MIN_SIZE = math.exp(-MAX_LOG_SIZE)


def decode(raw: Tensor, cells: Tensor, anchors_px: Tensor, stride_px: tuple[float, float], spec: YoloSpec) -> Tensor:
    """raw (..., 4), cells (..., 2) as column and row, anchors (..., 2) -> (..., 4) xyxy in input pixels."""
    stride = constant((stride_px[1], stride_px[0]), like=raw)
    offset = raw[..., :2].sigmoid() * spec.scale_x_y - (spec.scale_x_y - 1) / 2
    centre = (cells + offset) * stride
    extent = raw[..., 2:4]
    ratio = (2 * extent.sigmoid()).square() if spec.new_coords else extent.clamp(max=MAX_LOG_SIZE).exp()
    size = anchors_px * ratio.clamp(min=MIN_SIZE)
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def encode(boxes: Tensor, cells: Tensor, anchors_px: Tensor, stride_px: tuple[float, float], spec: YoloSpec) -> Tensor:
    """boxes (..., 4) xyxy in input pixels -> raw (..., 4), such that decode(encode(boxes)) = boxes.

    Where no finite logit exists (a centre on the edge of what the cell can reach, a size of 4 anchors or more
    with new_coords) the nearest reachable box is encoded.
    """
    stride = constant((stride_px[1], stride_px[0]), like=boxes)
    centre, size = (boxes[..., :2] + boxes[..., 2:4]) / 2, boxes[..., 2:4] - boxes[..., :2]
    offset = (centre / stride - cells + (spec.scale_x_y - 1) / 2) / spec.scale_x_y
    tiny = 1e-6
    position = offset.clamp(tiny, 1 - tiny).logit()
    ratio = (size / anchors_px).clamp(min=tiny)
    extent = (ratio.sqrt() / 2).clamp(tiny, 1 - tiny).logit() if spec.new_coords else ratio.log()
    return torch.cat((position, extent), dim=-1)


def cell_grid(height: int, width: int, like: Tensor) -> Tensor:
    """(H, W, 2): column and row of each cell, float32 on `like`'s device."""
    rows = torch.arange(height, device=like.device, dtype=torch.float32)
    columns = torch.arange(width, device=like.device, dtype=torch.float32)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y), dim=-1)


def decode_head(head: RawHead) -> Tensor:
    """All boxes of a head: (N, A, H, W, 4) xyxy in input pixels, float32 at least."""
    raw = head.logits[..., :4]
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    anchors = head.anchors_px().to(raw.dtype)[:, None, None]
    return decode(raw, cell_grid(*head.grid_hw, like=raw).to(raw.dtype), anchors, head.stride_px, head.spec)
