"""Which anchor of which cell answers for which object; and which cells are left alone.

YOLOv4's rule (YOLOv4 section 3.4 "multiple anchors for a single ground truth"; darknet yolo_layer.c): an object
belongs to the cell of its centre and to the best anchor by shape over all heads, and also to every other anchor
of this head whose shape IoU (or what iou_thresh_kind says) exceeds iou_thresh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cfg.layers import YoloSpec
from models.transfer import to_device_async
from utils.boxes import box_iou
from utils.structures import Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """P pairs of a cell's anchor and an object. All (P,) int64 and on the host, as targets are; `anchor` counts within
    the head's own anchors."""

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def place(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index into (N, A, H, W, ...)."""
        return self.image, self.anchor, self.row, self.column


def shape_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """(M, 2) and (A, 2) widths and heights -> (M, A) IoU of boxes sharing their centre."""
    intersection = torch.minimum(sizes[:, None], anchors[None]).prod(-1)
    union = sizes.prod(-1)[:, None] + anchors.prod(-1)[None] - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def shape_overlap(sizes: Tensor, anchors: Tensor, kind: str) -> Tensor:
    """As shape_iou, of any kind (darknet box.c); diou is IoU, because the centres are one.

    Of sizes as shares of the image: what ciou takes for an aspect ratio is darknet's.
    """
    iou = shape_iou(sizes, anchors)
    if kind == "giou":
        hull = torch.maximum(sizes[:, None], anchors[None]).prod(-1)
        union = (sizes.prod(-1)[:, None] + anchors.prod(-1)[None]) / (1 + iou)
        return iou - (hull - union) / hull
    if kind == "ciou":
        lean = torch.atan(sizes[:, None, 0] / sizes[:, None, 1]) - torch.atan(anchors[:, 0] / anchors[:, 1])
        v = 4 / math.pi**2 * lean.square()
        return iou - v.square() / (1 - iou + v + 1e-6)
    return iou


@torch.no_grad()
def assign(targets: Targets, spec: YoloSpec, grid_hw: tuple[int, int], stride_px: tuple[float, float]) -> Assignment:
    """The head's share of the objects, on the host. Crowd regions are nobody's. No objects: an empty Assignment."""
    boxes = targets.boxes
    sizes = boxes[:, 2:] - boxes[:, :2]
    anchors = torch.tensor(spec.anchors, dtype=boxes.dtype)
    own = torch.tensor(spec.mask)
    extent = torch.tensor((grid_hw[1] * stride_px[1], grid_hw[0] * stride_px[0]), dtype=boxes.dtype)
    chosen = shape_overlap(sizes / extent, anchors[own] / extent, spec.iou_thresh_kind) > spec.iou_thresh
    if len(boxes):
        chosen |= own[None] == shape_iou(sizes, anchors).argmax(1)[:, None]
    chosen &= ~targets.is_crowd[:, None]
    target, anchor = chosen.nonzero(as_tuple=True)
    centre = (boxes[target, :2] + boxes[target, 2:]) / 2
    # An object centred on the right or bottom edge belongs to the last cell.
    column = (centre[:, 0] / stride_px[1]).long().clamp(0, grid_hw[1] - 1)
    row = (centre[:, 1] / stride_px[0]).long().clamp(0, grid_hw[0] - 1)
    return Assignment(image=targets.image_index[target], anchor=anchor, row=row, column=column, target=target)


@torch.no_grad()
def best_overlap(boxes: Tensor, targets: Targets) -> Tensor:
    """How well each prediction covers some object of its image: (N, A, H, W, 4) -> (N, A, H, W) in 0..1.

    IoU; for crowd regions the share of the prediction that lies inside, as COCO's evaluation has it.
    """
    best = boxes.new_zeros(boxes.shape[:-1])
    for index, here in _images_with(targets):
        predicted, objects = boxes[index].reshape(-1, 4), to_device_async(targets.boxes[here], like=boxes)
        overlap = box_iou(predicted, objects)
        crowd = targets.is_crowd[here]
        if crowd.any():
            overlap = torch.where(to_device_async(crowd, like=boxes), _share_inside(predicted, objects), overlap)
        best[index] = overlap.amax(1).view(best.shape[1:])
    return best


@torch.no_grad()
def best_object(boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Each prediction's best object of its image, crowds not counted: (N, A, H, W, 4) -> IoU and index into targets,
    (N, A, H, W) each. The first of equals; IoU 0 and index 0 where there is none."""
    best = boxes.new_zeros(boxes.shape[:-1])
    target = torch.zeros_like(best, dtype=torch.long)
    for index, here in _images_with(targets):
        objects = (here & ~targets.is_crowd).nonzero()[:, 0]
        if len(objects):
            ground_truth = to_device_async(targets.boxes[objects], like=boxes)
            overlap, which = box_iou(boxes[index].reshape(-1, 4), ground_truth).max(1)
            best[index] = overlap.view(best.shape[1:])
            target[index] = to_device_async(objects, like=boxes)[which].view(best.shape[1:])
    return best, target


def _images_with(targets: Targets) -> Iterator[tuple[int, Tensor]]:
    """Each image that has objects, and which they are: (M,) bool."""
    for index in targets.image_index.unique().tolist():
        yield index, targets.image_index == index


def _share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """(P, 4), (R, 4) -> (P, R): part of each box's area inside each region."""
    top_left = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    inside = (bottom_right - top_left).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None]
    return inside / area.clamp(min=torch.finfo(area.dtype).tiny)
