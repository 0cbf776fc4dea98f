"""The loss head by head: four-fold indices, every box decoded with its gradient. What `YoloLoss` does in rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.yolo.anchor_grid import AnchorGrid
from models.yolo.assign import assign, best_overlap
from models.yolo.coder import decode_head, encode
from models.yolo.head import RawHead
from models.yolo.iou_loss import iou_loss
from models.yolo.loss import LossOptions
from utils.structures import Targets


def yolo_loss(heads: Sequence[RawHead], targets: Targets, options: LossOptions) -> Tensor:
    """(3,) box, objectness, classes."""
    return torch.stack([_of_head(head, targets, options) for head in heads]).sum(0)


def _of_head(head: RawHead, targets: Targets, options: LossOptions) -> Tensor:
    spec, logits, boxes = head.spec, head.logits, decode_head(head)
    pairs = assign(targets, spec, head.grid_hw, head.stride_px)
    overlap = best_overlap(boxes.detach(), targets)
    covers = overlap > spec.ignore_thresh
    wanted = torch.where(covers, overlap, 0) if spec.objectness_smooth else torch.zeros_like(overlap)
    weight = torch.where(covers, 0.0, 1.0)
    if spec.objectness_smooth:
        weight = torch.where(covers & (overlap > logits[..., 4].sigmoid()), 1.0, weight)
    box = classes = torch.zeros((), dtype=logits.dtype)
    smoothing = spec.label_smooth_eps if options.label_smoothing is None else options.label_smoothing
    asked: dict[tuple[int, ...], set[int]] = {}
    for place, target in zip(zip(*(index.tolist() for index in pairs.index), strict=True), pairs.target, strict=True):
        wanted[place] = weight[place] = 1
        asked.setdefault(place, set()).add(int(targets.labels[target]))
        box = box + _of_pair(head, boxes[place], logits[place], place, targets.boxes[target], options)
    for place, labels in asked.items():
        of_class = torch.full((spec.classes,), smoothing / 2, dtype=logits.dtype)
        of_class[list(labels)] = 1 - smoothing / 2
        classes = classes + F.binary_cross_entropy_with_logits(logits[place][5:], of_class, reduction="sum")
    objectness = F.binary_cross_entropy_with_logits(logits[..., 4], wanted, weight.to(logits.dtype), reduction="sum")
    return torch.stack((box, spec.obj_normalizer * objectness, spec.cls_normalizer * classes))


def _of_pair(
    head: RawHead, box: Tensor, raw: Tensor, place: tuple[int, ...], wanted: Tensor, options: LossOptions
) -> Tensor:
    spec = head.spec
    if spec.iou_loss != "mse":
        return options.box_gain * spec.iou_normalizer * iou_loss(box[None], wanted[None], spec.iou_loss)[0]
    _, anchor, row, column = place
    cell = torch.tensor([column, row], dtype=raw.dtype)
    goal = encode(wanted, AnchorGrid.of(cell, head.anchors_px()[anchor], head.stride_px, spec))
    error = torch.cat((raw[:2].sigmoid() - goal[:2].sigmoid(), raw[2:4] - goal[2:]))
    width, height = wanted[2] - wanted[0], wanted[3] - wanted[1]
    image = head.grid_hw[0] * head.stride_px[0] * head.grid_hw[1] * head.stride_px[1]
    return spec.iou_normalizer * (0.5 * (2 - width * height / image) * error.square()).sum()
