"""RawHead x Targets -> LossTerms: sums over the mini-batch, true gradients.

Sums, because the trainer divides by the images of the whole batch: then the gradient does not depend on how the
batch is cut into mini-batches.

Heads under the same rules lie in one row, all their cells' anchors behind each other: with an image or two in a
forward, a GPU is done with a kernel before the host has started the next, and each head would have its own hundred.

The weights of the three terms are the cfg's normalizers. darknet applies iou_normalizer to a box gradient
without the chain factors of the decoder (about sigmoid' * stride / image side), so for a true gradient its 0.07
is far too small: `box_gain` makes up for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfg.layers import YoloSpec
from models.transfer import to_device_async
from models.yolo.anchor_grid import Places, places_of
from models.yolo.assign import assign, best_overlap
from models.yolo.coder import at_least_float32, decode, encode
from models.yolo.head import RawHead
from models.yolo.iou_loss import iou_loss
from utils.knob import knob
from utils.structures import Targets


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


# What heads of one row must agree on. They differ in their anchors and in scale_x_y.
_RULES = (
    *("classes", "new_coords", "ignore_thresh", "objectness_smooth", "label_smooth_eps"),
    *("iou_loss", "iou_normalizer", "obj_normalizer", "cls_normalizer"),
)


class YoloLoss:
    """Box (CIoU or what the cfg says), objectness and class loss (binary cross entropy) over all heads."""

    def __init__(self, options: LossOptions) -> None:
        self.options = options

    def __call__(self, heads: Sequence[RawHead], targets: Targets) -> LossTerms:
        rows: dict[tuple[object, ...], list[RawHead]] = {}
        for head in heads:
            rows.setdefault(tuple(getattr(head.spec, rule) for rule in _RULES), []).append(head)
        terms = [self._terms_of_row(row, targets) for row in rows.values()]
        return LossTerms(
            box=sum_of([t.box for t in terms]),
            objectness=sum_of([t.objectness for t in terms]),
            classes=sum_of([t.classes for t in terms]),
        )

    def _terms_of_row(self, heads: Sequence[RawHead], targets: Targets) -> LossTerms:
        rules = heads[0].spec
        logits = at_least_float32(torch.cat([head.logits.flatten(1, 3) for head in heads], dim=1))  # (N, S, 5 + C)
        places = places_of(heads, logits.dtype)
        pairs = pairs_of(heads, targets)
        where = tuple(to_device_async(pairs.where, like=logits))
        objectness = self._objectness(logits, places, where, targets, rules)
        if len(pairs) == 0:
            # Keeps every logit in the graph: a parameter without a gradient stalls DDP.
            nothing = logits.sum() * 0
            return LossTerms(box=nothing, objectness=objectness, classes=nothing)
        said, which = logits[where], to_device_async(pairs.which, like=logits)
        wanted = to_device_async(targets.boxes[pairs.target], like=logits).to(logits.dtype)
        return LossTerms(
            box=self._box(said[which, :4], places[where[1][which]], wanted, heads[0]),
            objectness=objectness,
            classes=self._classes(said[:, 5:], pairs, targets, rules),
        )

    def _box(self, raw: Tensor, at: Places, wanted: Tensor, head: RawHead) -> Tensor:
        """raw, wanted: (P, 4) of each pair. head: any of the row."""
        spec = head.spec
        if spec.iou_loss != "mse":
            per_pair = iou_loss(decode(raw, at), wanted, spec.iou_loss)
            return self.options.box_gain * spec.iou_normalizer * per_pair.sum()
        # YOLOv3's squared error on offsets and log sizes, small boxes weighted up by 2 - area.
        goal = encode(wanted, at)
        error = torch.cat((raw[:, :2].sigmoid() - goal[:, :2].sigmoid(), raw[:, 2:] - goal[:, 2:]), dim=1)
        height, width = (cell * stride for cell, stride in zip(head.grid_hw, head.stride_px, strict=True))
        area = (wanted[:, 2:] - wanted[:, :2]).prod(-1) / (height * width)
        return spec.iou_normalizer * (0.5 * (2 - area)[:, None] * error.square()).sum()

    def _objectness(
        self, logits: Tensor, places: Places, where: tuple[Tensor, ...], targets: Targets, rules: YoloSpec
    ) -> Tensor:
        """Anchors that answer for an object say 1, others 0; those that cover one well anyway may say anything
        (or, with objectness_smooth, at least how well they cover it)."""
        said = logits[..., 4]
        with torch.no_grad():
            overlap = best_overlap(decode(logits[..., :4], places), targets)
            covers = overlap > rules.ignore_thresh
            wanted = torch.zeros_like(said)
            weight = (~covers).to(said.dtype)
            if rules.objectness_smooth:
                wanted = torch.where(covers, overlap, wanted)
                weight = torch.where(covers & (overlap > said.sigmoid()), 1, weight)
            wanted[where] = weight[where] = wanted.new_ones(())  # a number would be sent, in older versions of torch
        return rules.obj_normalizer * F.binary_cross_entropy_with_logits(said, wanted, weight, reduction="sum")

    def _classes(self, said: Tensor, pairs: Pairs, targets: Targets, rules: YoloSpec) -> Tensor:
        """said: (U, C). An anchor that answers for several objects is asked for all their classes, once."""
        wanted = torch.zeros(said.shape)
        wanted[pairs.which, targets.labels[pairs.target]] = 1
        smoothing = self.options.label_smoothing
        smoothing = rules.label_smooth_eps if smoothing is None else smoothing
        wanted = to_device_async(wanted, like=said).to(said.dtype) * (1 - smoothing) + smoothing / 2
        return rules.cls_normalizer * F.binary_cross_entropy_with_logits(said, wanted, reduction="sum")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """P pairs of a place in a row of heads and an object that it answers for, on the host.

    where: (2, U) image and place, each once. which: (P,), of these. target: (P,).
    """

    where: Tensor
    which: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)


def pairs_of(heads: Sequence[RawHead], targets: Targets) -> Pairs:
    """Places count as in `places_of`."""
    found, first = [], 0
    for head in heads:
        of_head = assign(targets, head.spec, head.grid_hw, head.stride_px)
        height, width = head.grid_hw
        place = first + (of_head.anchor * height + of_head.row) * width + of_head.column
        found.append(torch.stack((of_head.image, place, of_head.target)))
        first += len(head.spec.mask) * height * width
    *where, target = torch.cat(found, dim=1)
    unique, which = torch.stack(where).unique(dim=1, return_inverse=True)
    return Pairs(where=unique, which=which, target=target)


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum()
