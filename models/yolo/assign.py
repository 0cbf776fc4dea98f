"""Target assignment: positive (anchor, cell) pairs for each ground-truth box, and the overlaps behind the ignore mask.

YOLOv4's rule (YOLOv4 section 3.4 "multiple anchors for a single ground truth"; darknet yolo_layer.c): the cell that
holds the centre of a ground-truth box is responsible for it, with the best anchor by shape over all heads, and with
every other anchor of this head whose shape IoU (or what iou_thresh_kind names) exceeds iou_thresh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfg.yolo import YoloSpec
from models.transfer import to_device_async
from models.yolo.head import RawHead
from utils.boxes import box_iou, shape_iou, share_inside
from utils.structures import Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """P positives: pairs of an anchor in a cell and a ground-truth box, on the host like the targets.

    index: (image, anchor of the head, row, column), (P,) int64 each. target: (P,) int64, index into the Targets.
    """

    index: tuple[Tensor, Tensor, Tensor, Tensor]
    target: Tensor


def shape_overlap(sizes: Tensor, anchors: Tensor, kind: str) -> Tensor:
    """Return the overlap (M, A) of boxes that share their centre, by iou_thresh_kind (darknet box.c).

    sizes (M, 2), anchors (A, 2): widths and heights as shares of the image, because the aspect ratio in darknet's ciou
    is taken from these. diou equals IoU, because the centres coincide.
    """
    iou = shape_iou(sizes, anchors)
    if kind == "giou":
        hull = torch.maximum(sizes[:, None], anchors[None]).prod(-1)
        union = (sizes.prod(-1)[:, None] + anchors.prod(-1)[None]) / (1 + iou)
        return iou - (hull - union) / hull
    if kind == "ciou":
        angle = torch.atan(sizes[:, None, 0] / sizes[:, None, 1]) - torch.atan(anchors[:, 0] / anchors[:, 1])
        v = 4 / math.pi**2 * angle.square()
        return iou - v.square() / (1 - iou + v + 1e-6)
    return iou


@torch.no_grad()
def assign(targets: Targets, spec: YoloSpec, grid_hw: tuple[int, int], stride_px: tuple[float, float]) -> Assignment:
    """Return the positives of one head. Crowd regions have none. stride_px: (y, x)."""
    boxes = targets.boxes
    sizes = boxes[:, 2:] - boxes[:, :2]
    anchors = torch.tensor(spec.anchors, dtype=boxes.dtype)
    mask = torch.tensor(spec.mask)
    input_wh = torch.tensor((grid_hw[1] * stride_px[1], grid_hw[0] * stride_px[0]), dtype=boxes.dtype)
    overlap = shape_overlap(sizes / input_wh, anchors[mask] / input_wh, spec.iou_thresh_kind)
    positive = overlap > spec.iou_thresh
    if len(boxes):  # argmax needs an anchor axis of boxes
        positive |= mask[None] == shape_iou(sizes, anchors).argmax(1)[:, None]
    positive &= ~targets.is_crowd[:, None]
    target, anchor = positive.nonzero(as_tuple=True)
    centre = (boxes[target, :2] + boxes[target, 2:]) / 2
    # A box centred on the right or bottom edge belongs to the last cell.
    column = (centre[:, 0] / stride_px[1]).long().clamp(0, grid_hw[1] - 1)
    row = (centre[:, 1] / stride_px[0]).long().clamp(0, grid_hw[0] - 1)
    return Assignment(index=(targets.image_index[target], anchor, row, column), target=target)


def positive_pairs(heads: Sequence[RawHead], targets: Targets) -> Tensor:
    """Return the positives of all heads, (3, P) int64 on the host: image, index into their `anchor_grid`, target."""
    pairs, offset = [], 0
    for head in heads:
        assignment = assign(targets, head.spec, head.grid_hw, head.stride_px)
        (image, anchor, row, column), (height, width) = assignment.index, head.grid_hw
        pairs.append(torch.stack((image, offset + (anchor * height + row) * width + column, assignment.target)))
        offset += len(head.spec.mask) * height * width
    return torch.cat(pairs, dim=1)


@torch.no_grad()
def best_overlap(boxes: Tensor, targets: Targets) -> Tensor:
    """Return each prediction's best IoU with a ground-truth box of its image: (N, A, H, W, 4) -> (N, A, H, W).

    For a crowd region it is the share of the prediction inside the region, as in COCO's evaluation.
    """
    best = boxes.new_zeros(boxes.shape[:-1])
    for image, in_image in _images_with_targets(targets):
        predicted, gt = boxes[image].reshape(-1, 4), to_device_async(targets.boxes[in_image], like=boxes)
        overlap = box_iou(predicted, gt)
        crowd = targets.is_crowd[in_image]
        if crowd.any():
            overlap = torch.where(to_device_async(crowd, like=boxes), share_inside(predicted, gt), overlap)
        best[image] = overlap.amax(1).view(best.shape[1:])
    return best


@torch.no_grad()
def best_target(boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return each prediction's best IoU with a ground-truth box of its image, crowds excluded, and that box's index.

    (N, A, H, W, 4) -> two (N, A, H, W): IoU and index into the targets. The first of equals wins; both are 0 in images
    without ground truth.
    """
    best = boxes.new_zeros(boxes.shape[:-1])
    target = torch.zeros_like(best, dtype=torch.long)
    for image, in_image in _images_with_targets(targets):
        candidates = (in_image & ~targets.is_crowd).nonzero()[:, 0]
        if len(candidates):
            gt = to_device_async(targets.boxes[candidates], like=boxes)
            overlap, which = box_iou(boxes[image].reshape(-1, 4), gt).max(1)
            best[image] = overlap.view(best.shape[1:])
            target[image] = to_device_async(candidates, like=boxes)[which].view(best.shape[1:])
    return best, target


def _images_with_targets(targets: Targets) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of each image that has targets, and the mask (M,) of these targets."""
    for image in torch.unique(targets.image_index).tolist():
        yield image, targets.image_index == image
