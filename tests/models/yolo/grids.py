"""Anchors in cells, as `decode` and `encode` take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfg.yolo import YoloSpec


def grid_of(cells: Tensor, anchors_px: Tensor, stride_px: tuple[float, float], spec: YoloSpec) -> dict[str, Any]:
    """cells, anchors_px: (..., 2). stride_px: (y, x)."""
    rest = cells.new_tensor((stride_px[1], stride_px[0], spec.scale_x_y)).expand(*cells.shape[:-1], 3)
    grid = torch.cat((cells, anchors_px.to(cells.dtype), rest), dim=-1)
    return {"grid": grid, "new_coords": spec.new_coords}
