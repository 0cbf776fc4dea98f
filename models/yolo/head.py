"""RawHead: what the network says at one [yolo] layer, before anybody interprets it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cfg.layers import YoloSpec
from models.transfer import to_device_async


@dataclass(frozen=True, kw_only=True, slots=True)
class RawHead:
    """logits: (N, A, H, W, 5 + C) for x, y, w, h, objectness, classes. stride_px: (y, x) input pixels a cell."""

    logits: Tensor
    spec: YoloSpec
    stride_px: tuple[float, float]

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.logits.shape[2], self.logits.shape[3]

    def anchors_px(self) -> Tensor:
        """(A, 2) width and height of this head's anchors, in input pixels."""
        return to_device_async(torch.tensor(self.spec.head_anchors, dtype=torch.float32), like=self.logits)
