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
    """values: (..., 7), one anchor in one cell each, as the properties name them; one tensor, so that indexing takes
    one kernel."""

    values: Tensor
    new_coords: bool

    @property
    def cells(self) -> Tensor:
        """(..., 2) column and row."""
        return self.values[..., 0:2]

    @property
    def anchors_px(self) -> Tensor:
        """(..., 2) width and height in input pixels."""
        return self.values[..., 2:4]

    @property
    def stride_px(self) -> Tensor:
        """(..., 2) width and height of a cell in input pixels."""
        return self.values[..., 4:6]

    @property
    def scale(self) -> Tensor:
        """(..., 1) scale_x_y."""
        return self.values[..., 6:7]

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
        cells = cell_grid(height, width, like=torch.empty(0, dtype=dtype)).expand(len(spec.mask), -1, -1, -1)
        anchors = torch.tensor(spec.head_anchors, dtype=dtype)[:, None, None].expand_as(cells)
        parts.append(AnchorGrid.of(cells, anchors, stride_px, spec).values.flatten(0, 2))
    values = to_device_async(torch.cat(parts), like=torch.empty(0, device=device))
    return AnchorGrid(values=values, new_coords=layout[0][0].new_coords)


def cell_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Return (H, W, 2): column and row of each cell."""
    rows, columns = (torch.arange(count, dtype=like.dtype, device=like.device) for count in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y), dim=-1)
