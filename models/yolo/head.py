"""RawHead: the raw predictions at one [yolo] layer, before decoding; and how the convolution before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cfg.yolo import YoloSpec
from models.transfer import to_device_async

OBJECTNESS_PRIOR = 0.01  # initial probability of an object, small as in focal loss (Lin et al. 2017, section 4.1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawHead:
    """logits: (N, A, H, W, 5 + C) for x, y, w, h, objectness, classes. stride_px: (y, x) input pixels per cell."""

    logits: Tensor
    spec: YoloSpec
    stride_px: tuple[float, float]

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.logits.shape[2], self.logits.shape[3]

    def anchors_px(self) -> Tensor:
        """Return (A, 2) width and height of this head's anchors, in input pixels."""
        return to_device_async(torch.tensor(self.spec.head_anchors, dtype=torch.float32), like=self.logits)

    @classmethod
    def from_output(cls, output: Tensor, spec: YoloSpec, input_hw: torch.Size) -> RawHead:
        """Build it from the convolution's output (N, A * (5 + C), H, W), in darknet's channel order."""
        images, _, height, width = output.shape
        logits = output.view(images, len(spec.mask), 5 + spec.classes, height, width)
        stride_px = (input_hw[0] / height, input_hw[1] / width)
        return cls(logits=logits.permute(0, 1, 3, 4, 2), spec=spec, stride_px=stride_px)


@torch.no_grad()
def init_head(weight: Tensor, bias: Tensor, spec: YoloSpec) -> None:
    """Initialize the convolution before a head: predictions near the anchors, objectness at its prior."""
    weight.mul_(0.1)
    bias.zero_().view(len(spec.mask), -1)[:, 4] = math.log(OBJECTNESS_PRIOR / (1 - OBJECTNESS_PRIOR))
