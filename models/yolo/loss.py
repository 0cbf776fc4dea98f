"""YOLOv4's loss: raw heads and targets -> LossTerms, sums over the mini-batch, differentiated by autograd.

Sums, because the training step divides by the images of the whole batch: the gradient does not depend on how the batch
is cut into mini-batches.

Heads with the same settings are concatenated to (N, S, 5 + C), S the sum of A * H * W: one or two images per forward
are bound by kernel launches, of which each head would need a hundred.

The cfg's normalizers weight the three terms. darknet applies iou_normalizer to a box gradient without the chain factors
of the decoder (about sigmoid' * stride / image side), so for a true gradient its 0.07 is far too small. `box_gain`
compensates. Its default 32 is chosen, not derived or tuned: at t = 0 the factor for x and y is 0.25 * stride / side,
1/52 for stride 32 at 416 px, and 0.07 * 32 makes the box term's weight about 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfg.yolo import YoloSpec
from models.transfer import to_device_async
from models.yolo.assign import best_overlap, positive_pairs
from models.yolo.coder import anchor_grid, at_least_float32, decode, encode
from models.yolo.head import RawHead
from models.yolo.iou_loss import iou_loss
from utils.boxes import area
from utils.knob import knob
from utils.structures import Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Which loss, and its weights beside the cfg's."""

    loss: str = knob(
        "autograd",
        "autograd: the cfg's loss with its true gradient; darknet: darknet's own deltas in place of a gradient",
        choices=("autograd", "darknet"),
    )
    box_gain: float = knob(
        32.0, "factor on the cfg's iou_normalizer with --loss autograd, whose true gradient is smaller", low=0
    )
    label_smoothing: float | None = knob(
        None,
        "smooth class targets to eps/2 and 1 - eps/2 (default: the cfg's label_smooth_eps)",
        unit="EPS",
        low=0,
        high=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """Scalars: the weighted sums over the images of the mini-batch, or darknet's printed cost with DarknetLoss."""

    box: Tensor
    objectness: Tensor
    classes: Tensor

    @property
    def total(self) -> Tensor:
        return self.box + self.objectness + self.classes

    def detached(self) -> Tensor:
        """Return (3,) box, objectness, classes, for the log."""
        return torch.stack((self.box, self.objectness, self.classes)).detach()


# Settings on which concatenated heads must agree. They may differ in anchors and scale_x_y.
_SHARED_SETTINGS = (
    "classes",
    "new_coords",
    "ignore_thresh",
    "objectness_smooth",
    "label_smooth_eps",
    "iou_loss",
    "iou_normalizer",
    "obj_normalizer",
    "cls_normalizer",
)


class YoloLoss:
    """Box loss (CIoU or the cfg's iou_loss), objectness and class loss (binary cross entropy) over all heads."""

    def __init__(self, options: LossOptions) -> None:
        self.options = options

    def __call__(self, heads: Sequence[RawHead], targets: Targets) -> LossTerms:
        groups: dict[tuple[object, ...], list[RawHead]] = {}
        for head in heads:
            groups.setdefault(tuple(getattr(head.spec, name) for name in _SHARED_SETTINGS), []).append(head)
        terms = [self._group_terms(group, targets) for group in groups.values()]
        return LossTerms(
            box=_sum([t.box for t in terms]),
            objectness=_sum([t.objectness for t in terms]),
            classes=_sum([t.classes for t in terms]),
        )

    def _group_terms(self, heads: Sequence[RawHead], targets: Targets) -> LossTerms:
        spec = heads[0].spec
        logits = at_least_float32(torch.cat([head.logits.flatten(1, 3) for head in heads], dim=1))  # (N, S, 5 + C)
        grid = anchor_grid(heads, logits.dtype)
        # P pairs of a positive anchor and a ground-truth box; U anchors, each of which may be in several pairs.
        pairs = positive_pairs(heads, targets)
        anchors, which = torch.unique(pairs[:2], dim=1, return_inverse=True)
        index, target = tuple(to_device_async(anchors, like=logits)), pairs[2]
        objectness = self._objectness(logits, grid, index, targets, spec)
        if len(target) == 0:
            # Keeps every logit in the graph: a parameter without a gradient stalls DDP.
            zero = logits.sum() * 0
            return LossTerms(box=zero, objectness=objectness, classes=zero)
        positive_logits, row = logits[index], to_device_async(which, like=logits)
        target_boxes = to_device_async(targets.boxes[target], like=logits).to(logits.dtype)
        return LossTerms(
            box=self._box(positive_logits[row, :4], grid[index[1][row]], target_boxes, heads[0]),
            objectness=objectness,
            classes=self._classes(positive_logits[:, 5:], which, targets.labels[target], spec),
        )

    def _box(self, logits: Tensor, grid: Tensor, target: Tensor, head: RawHead) -> Tensor:
        """logits, target: (P, 4), one row per pair. head: any of the group."""
        spec = head.spec
        if spec.iou_loss != "mse":
            loss = iou_loss(decode(logits, grid, new_coords=spec.new_coords), target, spec.iou_loss)
            return self.options.box_gain * spec.iou_normalizer * loss.sum()
        # YOLOv3's squared error of offsets and log sizes; small boxes weigh more.
        target_logits = encode(target, grid, new_coords=spec.new_coords)
        error = torch.cat(
            (logits[:, :2].sigmoid() - target_logits[:, :2].sigmoid(), logits[:, 2:] - target_logits[:, 2:]), dim=1
        )
        height, width = (cells * stride for cells, stride in zip(head.grid_hw, head.stride_px, strict=True))
        weight = 2 - area(target) / (height * width)
        return spec.iou_normalizer * (0.5 * weight[:, None] * error.square()).sum()

    def _objectness(
        self, logits: Tensor, grid: Tensor, index: tuple[Tensor, ...], targets: Targets, spec: YoloSpec
    ) -> Tensor:
        """Targets: 1 for positives, 0 for negatives; anchors whose best overlap exceeds ignore_thresh are ignored.

        With objectness_smooth the latter have their overlap as target, and are ignored where they exceed it. index: of
        the positives.
        """
        objectness = logits[..., 4]
        with torch.no_grad():
            overlap = best_overlap(decode(logits[..., :4], grid, new_coords=spec.new_coords), targets)
            ignored = overlap > spec.ignore_thresh
            target = torch.zeros_like(objectness)
            weight = (~ignored).to(objectness.dtype)
            if spec.objectness_smooth:
                target = torch.where(ignored, overlap, target)
                weight = torch.where(ignored & (overlap > objectness.sigmoid()), 1, weight)
            # A tensor, because older versions of torch copy a Python number to the GPU and wait.
            target[index] = weight[index] = target.new_ones(())
        return spec.obj_normalizer * F.binary_cross_entropy_with_logits(objectness, target, weight, reduction="sum")

    def _classes(self, logits: Tensor, rows: Tensor, labels: Tensor, spec: YoloSpec) -> Tensor:
        """logits: (U, C). rows, labels: (P,) on the host, one per pair; a row may have several classes."""
        target = torch.zeros(logits.shape)
        target[rows, labels] = 1
        smoothing = self.options.label_smoothing
        smoothing = spec.label_smooth_eps if smoothing is None else smoothing
        target = to_device_async(target, like=logits).to(logits.dtype) * (1 - smoothing) + smoothing / 2
        return spec.cls_normalizer * F.binary_cross_entropy_with_logits(logits, target, reduction="sum")


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum()
