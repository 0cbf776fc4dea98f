"""Places: the cells' anchors of one head, or of several in a row, and what turns raw numbers there into boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cfg.layers import YoloSpec
from models.transfer import to_device_async
from models.yolo.head import RawHead


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """numbers: (..., 7), see the properties; in one tensor, so that those of some places take one kernel."""

    numbers: Tensor
    new_coords: bool

    @property
    def cells(self) -> Tensor:
        """(..., 2) column and row."""
        return self.numbers[..., 0:2]

    @property
    def anchors_px(self) -> Tensor:
        """(..., 2) width and height in input pixels."""
        return self.numbers[..., 2:4]

    @property
    def stride_px(self) -> Tensor:
        """(..., 2) width and height of a cell in input pixels."""
        return self.numbers[..., 4:6]

    @property
    def scale(self) -> Tensor:
        """(..., 1) scale_x_y."""
        return self.numbers[..., 6:7]

    def __getitem__(self, index: Tensor) -> Places:
        return Places(numbers=self.numbers[index], new_coords=self.new_coords)

    @classmethod
    def of(cls, cells: Tensor, anchors_px: Tensor, stride_px: tuple[float, float], spec: YoloSpec) -> Places:
        """cells, anchors_px: (..., 2). stride_px: (y, x), as a RawHead has it."""
        rest = cells.new_tensor((stride_px[1], stride_px[0], spec.scale_x_y)).expand(*cells.shape[:-1], 3)
        return cls(numbers=torch.cat((cells, anchors_px.to(cells.dtype), rest), dim=-1), new_coords=spec.new_coords)


def places_of(heads: Sequence[RawHead], dtype: torch.dtype) -> Places:
    """All of them in a row (S, 7), head by head, in each anchor by anchor, row by row; on the heads' device.

    The heads must agree on new_coords.
    """
    kinds = tuple((head.spec, head.grid_hw, head.stride_px) for head in heads)
    return _made(kinds, dtype, heads[0].logits.device)


@lru_cache(maxsize=64)  # a size that multi-scale draws comes again
def _made(
    kinds: tuple[tuple[YoloSpec, tuple[int, int], tuple[float, float]], ...], dtype: torch.dtype, device: torch.device
) -> Places:
    rows = []
    for spec, (height, width), stride_px in kinds:
        cells = cell_grid(height, width, like=torch.empty(0, dtype=dtype)).expand(len(spec.mask), -1, -1, -1)
        anchors = torch.tensor(spec.head_anchors, dtype=dtype)[:, None, None].expand_as(cells)
        rows.append(Places.of(cells, anchors, stride_px, spec).numbers.flatten(0, 2))
    numbers = to_device_async(torch.cat(rows), like=torch.empty(0, device=device))
    return Places(numbers=numbers, new_coords=kinds[0][0].new_coords)


def cell_grid(height: int, width: int, like: Tensor) -> Tensor:
    """(H, W, 2): column and row of each cell."""
    rows, columns = (torch.arange(count, dtype=like.dtype, device=like.device) for count in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y), dim=-1)
