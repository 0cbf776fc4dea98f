"""The anchors of all cells, of one head or of several concatenated: what decodes raw predictions into boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cfg.yolo import YoloSpec
from models.transfer import to_device_async
from models.yolo.head import RawHead


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorGrid:
    """values: (..., 7), one anchor in one cell each; one tensor, so that indexing takes one kernel."""

    values: Tensor
    new_coords: bool

    def parts(self) -> tuple[Tensor, ...]:
        """Return cell (..., 2) column and row, anchor (..., 2) and stride (..., 2), widths and heights in input pixels,
        and scale_x_y (..., 1)."""
        return torch.split(self.values, [2, 2, 2, 1], dim=-1)

    def __getitem__(self, index: Tensor) -> AnchorGrid:
        return AnchorGrid(values=self.values[index], new_coords=self.new_coords)

    @classmethod
    def of(cls, cells: Tensor, anchors_px: Tensor, stride_px: tuple[float, float], spec: YoloSpec) -> AnchorGrid:
        """Build it from cells and anchors_px (..., 2) and stride_px (y, x)."""
        rest = cells.new_tensor((stride_px[1], stride_px[0], spec.scale_x_y)).expand(*cells.shape[:-1], 3)
        return cls(values=torch.cat((cells, anchors_px.to(cells.dtype), rest), dim=-1), new_coords=spec.new_coords)


def anchor_grid(heads: Sequence[RawHead], dtype: torch.dtype) -> AnchorGrid:
    """Return all anchors (S, 7) of the heads, on their device, ordered by head, anchor, row, column.

    The heads must agree on new_coords.
    """
    layout = tuple((head.spec, head.grid_hw, head.stride_px) for head in heads)
    return _build(layout, dtype, heads[0].logits.device)


@lru_cache(maxsize=64)  # multi-scale training returns to each of its sizes
def _build(
    layout: tuple[tuple[YoloSpec, tuple[int, int], tuple[float, float]], ...], dtype: torch.dtype, device: torch.device
) -> AnchorGrid:
    parts = []
    for spec, (height, width), stride_px in layout:
        rows, columns = torch.arange(height, dtype=dtype), torch.arange(width, dtype=dtype)
        cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).expand(len(spec.mask), -1, -1, -1)
        anchors = torch.tensor(spec.head_anchors, dtype=dtype)[:, None, None].expand_as(cells)
        parts.append(AnchorGrid.of(cells, anchors, stride_px, spec).values.flatten(0, 2))
    values = to_device_async(torch.cat(parts), like=torch.empty(0, device=device))
    return AnchorGrid(values=values, new_coords=layout[0][0].new_coords)
