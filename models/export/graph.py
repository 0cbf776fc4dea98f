"""What an exported file computes: the network, and boxes decoded from its heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cfg.plan import Plan
from cfg.yolo import YoloSpec
from models.network import Network
from models.yolo.coder import at_least_float32, decode
from models.yolo.head import RawHead


class ExportGraph(nn.Module):
    """images (N, 3, H, W) float32 in 0..1, RGB -> a tuple of outputs, float32.

    Not decoded: the logits (N, A * (5 + C), H', W') of each [yolo], in darknet's channel order. Decoded: one tensor
    (N, S, 4 + 1 + C), boxes xyxy in input pixels, then objectness and classes in 0..1; S in darknet's order, by head,
    row, column, anchor. A fixed size is that of the network's plan; strides are always the plan's.
    """

    def __init__(self, network: Network, *, decoded: bool, is_dynamic: bool) -> None:
        super().__init__()
        self.network, self.decoded = network, decoded
        self.strides_px = strides_px(network.plan)
        shapes = [network.plan.nodes[index].shape for index in network.plan.heads]
        grids = [
            make_grid(spec, shape.height, shape.width, stride_px)
            for spec, shape, stride_px in zip(network.plan.head_specs, shapes, self.strides_px, strict=True)
        ]
        self.grids: list[Tensor | None] = [None] * len(grids) if is_dynamic else [*grids]  # None: made in the graph

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        heads = self.network(images.to(next(self.network.parameters()).dtype))
        if not self.decoded:
            return tuple(at_least_float32(head.logits.permute(0, 1, 4, 2, 3).flatten(1, 2)) for head in heads)
        parts = map(_decoded, heads, self.grids, self.strides_px)
        return (torch.cat(tuple(parts), dim=1),)


def strides_px(plan: Plan) -> list[tuple[float, float]]:
    """Return the input pixels per cell of each head, (y, x)."""
    height, width = plan.net.input_hw
    shapes = [plan.nodes[index].shape for index in plan.heads]
    return [(height / shape.height, width / shape.width) for shape in shapes]


def make_grid(spec: YoloSpec, height: Any, width: Any, stride_px: tuple[float, float]) -> Tensor:
    """Return (H, W, A, 7), columns as in `coder.grid_parts`. Height and width are traced where they are tensors."""
    rows = torch.arange(height, dtype=torch.float32).view(-1, 1, 1, 1)
    columns = torch.arange(width, dtype=torch.float32).view(1, -1, 1, 1)
    anchors = torch.tensor(spec.head_anchors)  # (A, 2)
    rest = torch.tensor((*stride_px[::-1], spec.scale_x_y))
    parts = (columns, rows, anchors, rest)
    return torch.cat([part.expand(height, width, len(spec.mask), -1) for part in parts], dim=-1)


def _decoded(head: RawHead, grid: Tensor | None, stride_px: tuple[float, float]) -> Tensor:
    """Return (N, H * W * A, 4 + 1 + C)."""
    logits = at_least_float32(head.logits.permute(0, 2, 3, 1, 4))  # (N, H, W, A, 5 + C)
    grid = make_grid(head.spec, *head.grid_hw, stride_px) if grid is None else grid
    boxes = decode(logits[..., :4], grid, new_coords=head.spec.new_coords)
    return torch.cat((boxes, logits[..., 4:].sigmoid()), dim=-1).flatten(1, 3)
