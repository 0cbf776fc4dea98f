"""RawHead x Targets -> LossTerms: sums over the mini-batch, true gradients.

Sums, because the trainer divides by the images of the whole batch: then the gradient does not depend on how the
batch is cut into mini-batches.

The weights of the three terms are the cfg's normalisers. darknet applies iou_normalizer to a box gradient
without the chain factors of the decoder (about sigmoid' * stride / image side), so for a true gradient its 0.07
is far too small: `box_gain` makes up for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.yolo.assign import Assignment, assign, best_overlap
from models.yolo.coder import decode_head, encode
from models.yolo.head import RawHead
from models.yolo.iou_loss import iou_loss
from utils.knob import knob
from utils.structures import Targets
from utils.transfer import sent


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    loss: str = knob(
        "autograd",
        "autograd: the cfg's loss and its true gradient; darknet: darknet's own deltas in place of a gradient",
        choices=("autograd", "darknet"),
    )
    box_gain: float = knob(
        32.0, "autograd: factor on the cfg's iou_normalizer, because the true gradient is smaller", low=0
    )
    label_smoothing: float | None = knob(
        None,
        "class targets become eps/2 and 1 - eps/2 (default: the cfg's label_smooth_eps)",
        unit="EPS",
        low=0,
        high=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """Scalars: weighted sums over the mini-batch's images; of DarknetLoss, the cost that darknet prints."""

    box: Tensor
    objectness: Tensor
    classes: Tensor

    @property
    def total(self) -> Tensor:
        return self.box + self.objectness + self.classes

    def detached(self) -> Tensor:
        """(3,) box, objectness, classes: for the log."""
        return torch.stack((self.box, self.objectness, self.classes)).detach()


Place = tuple[Tensor, ...]  # image, anchor, row, column: the cells' anchors that answer for the objects, in order


class YoloLoss:
    """Box (CIoU or what the cfg says), objectness and class loss (binary cross entropy) over all heads."""

    def __init__(self, options: LossOptions) -> None:
        self.options = options

    def __call__(self, heads: Sequence[RawHead], targets: Targets) -> LossTerms:
        terms = [self._head_terms(head, targets) for head in heads]
        return LossTerms(
            box=torch.stack([t.box for t in terms]).sum(),
            objectness=torch.stack([t.objectness for t in terms]).sum(),
            classes=torch.stack([t.classes for t in terms]).sum(),
        )

    def _head_terms(self, head: RawHead, targets: Targets) -> LossTerms:
        spec = head.spec
        logits = head.logits.to(torch.promote_types(head.logits.dtype, torch.float32))
        boxes = decode_head(head)
        assignment = assign(targets, spec, head.grid_hw, head.stride_px)
        place = tuple(sent(torch.stack(assignment.place), like=logits))
        objectness = self._objectness(logits[..., 4], boxes, place, head, targets)
        if len(assignment) == 0:
            # Keeps every logit in the graph: a parameter without a gradient stalls DDP.
            nothing = logits.sum() * 0
            return LossTerms(box=nothing, objectness=objectness, classes=nothing)
        return LossTerms(
            box=self._box(logits, boxes, place, sent(targets.boxes[assignment.target], like=boxes), head),
            objectness=objectness,
            classes=self._classes(logits, assignment, head, targets),
        )

    def _box(self, logits: Tensor, boxes: Tensor, place: Place, wanted: Tensor, head: RawHead) -> Tensor:
        spec = head.spec
        wanted = wanted.to(boxes.dtype)
        if spec.iou_loss != "mse":
            per_pair = iou_loss(boxes[place], wanted, spec.iou_loss)
            return self.options.box_gain * spec.iou_normalizer * per_pair.sum()
        # YOLOv3's squared error on offsets and log sizes, small boxes weighted up by 2 - area.
        _, anchor, row, column = place
        cells = torch.stack((column, row), dim=-1).to(boxes.dtype)
        anchors = head.anchors_px().to(boxes.dtype)[anchor]
        goal = encode(wanted, cells, anchors, head.stride_px, spec)
        raw = logits[place][:, :4]
        error = torch.cat((raw[:, :2].sigmoid() - goal[:, :2].sigmoid(), raw[:, 2:] - goal[:, 2:]), dim=1)
        height, width = (cell * stride for cell, stride in zip(head.grid_hw, head.stride_px, strict=True))
        area = (wanted[:, 2:] - wanted[:, :2]).prod(-1) / (height * width)
        return spec.iou_normalizer * (0.5 * (2 - area)[:, None] * error.square()).sum()

    def _objectness(self, logits: Tensor, boxes: Tensor, place: Place, head: RawHead, targets: Targets) -> Tensor:
        """Anchors that answer for an object say 1, others 0; those that cover one well anyway may say anything
        (or, with objectness_smooth, at least how well they cover it)."""
        spec = head.spec
        overlap = best_overlap(boxes.detach(), targets)
        covers = overlap > spec.ignore_thresh
        wanted = torch.zeros_like(logits)
        weight = (~covers).to(logits.dtype)
        if spec.objectness_smooth:
            wanted = torch.where(covers, overlap, wanted)
            weight = torch.where(covers & (overlap > logits.detach().sigmoid()), 1, weight)
        wanted[place] = weight[place] = wanted.new_ones(())  # a number would be sent, in older versions of torch
        loss = F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum")
        return spec.obj_normalizer * loss

    def _classes(self, logits: Tensor, assignment: Assignment, head: RawHead, targets: Targets) -> Tensor:
        """An anchor that answers for several objects is asked for all their classes, once."""
        spec = head.spec
        places, of_pair = torch.stack(assignment.place).unique(dim=1, return_inverse=True)
        said = logits[tuple(sent(places, like=logits))][:, 5:]
        wanted = torch.zeros_like(said)
        asked = torch.stack((of_pair, targets.labels[assignment.target]))
        wanted[tuple(sent(asked, like=logits))] = wanted.new_ones(())
        smoothing = self.options.label_smoothing
        smoothing = spec.label_smooth_eps if smoothing is None else smoothing
        wanted = wanted * (1 - smoothing) + smoothing / 2
        return spec.cls_normalizer * F.binary_cross_entropy_with_logits(said, wanted, reduction="sum")
