"""Raw predictions (tx, ty, tw, th) <-> boxes: `decode`, and its inverse `encode`.

YOLOv3/v4 (Redmon & Farhadi 2018, section 2.1; scale_x_y: YOLOv4 section 3.4):
    centre = (cell + s * sigmoid(t) - (s - 1) / 2) * stride,   size = anchor * exp(t)
Scaled-YOLOv4 (`new_coords=1`): size = anchor * (2 * sigmoid(t))^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cfg.yolo import YoloSpec
from models.transfer import to_device_async
from models.yolo.head import RawHead

# exp(8) is 2981 anchor widths: no real box, but finite, so that one wild logit cannot poison a loss.
MAX_LOG_SIZE = 8.0
# The smallest size as a share of the anchor: sides must survive rounding, or CIoU divides 0 by 0.
MIN_SIZE = math.exp(-MAX_LOG_SIZE)


def anchor_grid(heads: Sequence[RawHead], dtype: torch.dtype) -> Tensor:
    """Return the anchors of all cells of the heads (S, 7), on their device, ordered by head, anchor, row, column.

    Columns: see `grid_parts`. One tensor, so that indexing takes one kernel.
    """
    layout = tuple((head.spec, head.grid_hw, head.stride_px) for head in heads)
    return _grid(layout, dtype, heads[0].logits.device)


@lru_cache(maxsize=64)  # multi-scale training returns to each of its sizes
def _grid(
    layout: tuple[tuple[YoloSpec, tuple[int, int], tuple[float, float]], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    parts = []
    for spec, (height, width), stride_px in layout:
        rows, columns = torch.arange(height, dtype=dtype), torch.arange(width, dtype=dtype)
        cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).expand(len(spec.mask), -1, -1, -1)
        anchors = torch.tensor(spec.head_anchors, dtype=dtype)[:, None, None].expand_as(cells)
        rest = torch.tensor((*stride_px[::-1], spec.scale_x_y), dtype=dtype).expand(*cells.shape[:-1], 3)
        parts.append(torch.cat((cells, anchors, rest), dim=-1).flatten(0, 2))
    return to_device_async(torch.cat(parts), like=torch.empty(0, device=device))


def grid_parts(grid: Tensor) -> tuple[Tensor, ...]:
    """Split a grid (..., 7) into cell (..., 2) column and row, anchor (..., 2) and stride (..., 2), widths and heights
    in input pixels, and scale_x_y (..., 1)."""
    return torch.split(grid, [2, 2, 2, 1], dim=-1)


def decode(logits: Tensor, grid: Tensor, *, new_coords: bool) -> Tensor:
    """logits (..., 4) -> boxes (..., 4) xyxy in input pixels."""
    cell, anchor_px, stride_px, scale = grid_parts(grid)
    offset = logits[..., :2].sigmoid() * scale - (scale - 1) / 2
    centre = (cell + offset) * stride_px
    size = logits[..., 2:4]
    ratio = (2 * size.sigmoid()).square() if new_coords else size.clamp(max=MAX_LOG_SIZE).exp()
    half = anchor_px * ratio.clamp(min=MIN_SIZE) / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def encode(boxes: Tensor, grid: Tensor, *, new_coords: bool) -> Tensor:
    """boxes (..., 4) xyxy in input pixels -> logits (..., 4), such that decode(encode(boxes)) = boxes.

    Where no finite logit exists (a centre on the edge of what the cell can reach, a size of 4 anchors or more
    with new_coords) the nearest reachable box is encoded.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:4]) / 2, boxes[..., 2:4] - boxes[..., :2]
    cell, anchor_px, stride_px, scale = grid_parts(grid)
    offset = (centre / stride_px - cell + (scale - 1) / 2) / scale
    tiny = 1e-6
    position = offset.clamp(tiny, 1 - tiny).logit()
    ratio = (size / anchor_px).clamp(min=tiny)
    extent = (ratio.sqrt() / 2).clamp(tiny, 1 - tiny).logit() if new_coords else ratio.log()
    return torch.cat((position, extent), dim=-1)


def decode_head(head: RawHead) -> Tensor:
    """Return all boxes of a head: (N, A, H, W, 4) xyxy in input pixels, float32 at least."""
    logits = at_least_float32(head.logits[..., :4])
    grid = anchor_grid([head], logits.dtype)
    return decode(logits.flatten(1, 3), grid, new_coords=head.spec.new_coords).view(logits.shape)


def at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
