"""The loss head by head: four-fold indices, every box decoded with its gradient. `YoloLoss` concatenates them."""

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
    ignored = overlap > spec.ignore_thresh
    objectness_target = torch.where(ignored, overlap, 0) if spec.objectness_smooth else torch.zeros_like(overlap)
    weight = torch.where(ignored, 0.0, 1.0)
    if spec.objectness_smooth:
        weight = torch.where(ignored & (overlap > logits[..., 4].sigmoid()), 1.0, weight)
    box = classes = torch.zeros((), dtype=logits.dtype)
    smoothing = spec.label_smooth_eps if options.label_smoothing is None else options.label_smoothing
    labels_at: dict[tuple[int, ...], set[int]] = {}
    for place, target in zip(zip(*(index.tolist() for index in pairs.index), strict=True), pairs.target, strict=True):
        objectness_target[place] = weight[place] = 1
        labels_at.setdefault(place, set()).add(int(targets.labels[target]))
        box = box + _of_pair(head, boxes[place], logits[place], place, targets.boxes[target], options)
    for place, labels in labels_at.items():
        of_class = torch.full((spec.classes,), smoothing / 2, dtype=logits.dtype)
        of_class[list(labels)] = 1 - smoothing / 2
        classes = classes + F.binary_cross_entropy_with_logits(logits[place][5:], of_class, reduction="sum")
    objectness = F.binary_cross_entropy_with_logits(
        logits[..., 4], objectness_target, weight.to(logits.dtype), reduction="sum"
    )
    return torch.stack((box, spec.obj_normalizer * objectness, spec.cls_normalizer * classes))


def _of_pair(
    head: RawHead, box: Tensor, raw: Tensor, place: tuple[int, ...], target: Tensor, options: LossOptions
) -> Tensor:
    spec = head.spec
    if spec.iou_loss != "mse":
        return options.box_gain * spec.iou_normalizer * iou_loss(box[None], target[None], spec.iou_loss)[0]
    _, anchor, row, column = place
    cell = torch.tensor([column, row], dtype=raw.dtype)
    target_logits = encode(target, AnchorGrid.of(cell, head.anchors_px()[anchor], head.stride_px, spec))
    error = torch.cat((raw[:2].sigmoid() - target_logits[:2].sigmoid(), raw[2:4] - target_logits[2:]))
    width, height = target[2] - target[0], target[3] - target[1]
    image = head.grid_hw[0] * head.stride_px[0] * head.grid_hw[1] * head.stride_px[1]
    return spec.iou_normalizer * (0.5 * (2 - width * height / image) * error.square()).sum()
