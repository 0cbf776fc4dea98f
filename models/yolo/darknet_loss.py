"""darknet's own training signal: hand-written deltas that are not the gradient of any loss, applied as one.

darknet (yolo_layer.c, box.c) writes for each output a delta, which gradient ascent adds, and prints a cost from which
the deltas are not derived. Differences from the gradient of `loss.py`:

- the box delta is nearly the derivative of IoU (`darknet_iou_grad.py`) with respect to x, y, w, h as shares of the
  image; of the decoder only exp(tw) and exp(th) are chained, not the sigmoid, scale_x_y, the grid or the anchor;
- an anchor is ignored only if one of its class probabilities exceeds 0.25, too;
- a further ground-truth box of the same anchor changes the delta of its own class only, so that earlier classes stay;
- with objectness_smooth a positive anchor that does not overlap its box well keeps the objectness target 0;
- with new_coords the deltas pass through the logistic before the head, like those of a squared error.

Example: a prediction of (0.5, 0.5, 0.2, 0.2) with tw = th = 0 for the box (0.5, 0.5, 0.4, 0.2), iou_loss=iou and
iou_normalizer=0.07. IoU is 0.5 and d IoU / dw is 2.5; darknet's is 5, which makes the delta of tw 0.07 * 5 * exp(0) =
0.35. The true gradient has another factor dw / dtw = 0.2: 0.07 * 2.5 * 0.2 = 0.035.

Crowd regions, which darknet does not have, are handled as in `assign.best_overlap`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfg.yolo import YoloSpec
from models.transfer import constant_like, to_device_async
from models.yolo.assign import best_overlap, best_target, positive_pairs
from models.yolo.coder import anchor_grid, at_least_float32, grid_parts
from models.yolo.darknet_iou_grad import iou_grad
from models.yolo.head import RawHead
from models.yolo.iou_loss import iou_loss
from models.yolo.loss import LossOptions, LossTerms
from utils.errors import UserError
from utils.structures import Targets

CLASS_SURE = 0.25
MAX_SIDE = 1e15  # of the image's side: the IoU of larger boxes is the same in float32, but their areas overflow


class DarknetLoss:
    """A criterion like YoloLoss whose gradient is minus darknet's delta, summed over the mini-batch.

    The LossTerms add up to the cost that darknet prints for the mini-batch, not divided by its images: box is
    iou_normalizer * mean of 1 - IoU (GIoU with iou_loss=giou) over the positives, objectness and classes are
    obj_normalizer * the sum of their squared deltas (with iou_loss=mse all three are sums of squared deltas, without
    the factor); each is the mean over the heads (yolo_layer.c, the end of forward_yolo_layer). Each term's gradient
    holds the deltas of its own entries.
    """

    def __init__(self, options: LossOptions) -> None:
        if options.box_gain != LossOptions().box_gain:
            raise UserError("--box-gain is read by --loss autograd, not by --loss darknet")
        self.options = options

    def __call__(self, heads: Sequence[RawHead], targets: Targets) -> LossTerms:
        smoothing = self.options.label_smoothing
        terms = []
        for head in heads:
            eps = head.spec.label_smooth_eps if smoothing is None else smoothing
            delta, cost = head_deltas(head, targets, label_smooth_eps=eps)
            terms.append(_DeltaAsGradient.apply(head.logits, delta, cost / len(heads)))
        box, objectness, classes = torch.stack(terms).sum(0).unbind()
        return LossTerms(box=box, objectness=objectness, classes=classes)


@torch.no_grad()
def head_deltas(head: RawHead, targets: Targets, *, label_smooth_eps: float) -> tuple[Tensor, Tensor]:
    """Return darknet's delta of each logit (N, A, H, W, 5 + C), float32 at least, and the cost (3,) of DarknetLoss."""
    layer = _DarknetLayer(head, targets, label_smooth_eps)
    layer.set_negatives()
    image, index, target = positive_pairs([head], targets)
    rows = image * len(layer.anchors) + index
    pairs = torch.stack((rows, target))
    for turn in _turns(rows):
        layer.add_positives(*to_device_async(pairs[:, turn], like=layer.output))
    layer.average()
    delta, cost = layer.delta.view(head.logits.shape), layer.cost(*to_device_async(pairs, like=layer.output))
    if head.spec.new_coords:
        # darknet's delta refers to the output of the convolution's logistic, RawHead holds its input.
        p = head.logits.to(delta.dtype).sigmoid()
        delta = delta * p * (1 - p)
    return delta * head.spec.delta_normalizer, cost


def class_multipliers(spec: YoloSpec) -> tuple[float, ...]:
    """Return the weight of each class: inverse to its count in counters_per_class, 1 for the most frequent one, at most
    max_delta. Without counts all are 1."""
    if not spec.counters_per_class:
        return (1.0,) * spec.classes
    most = max(spec.counters_per_class)
    return tuple(min(most / count, spec.max_delta) for count in spec.counters_per_class)


class _DeltaAsGradient(torch.autograd.Function):
    """logits, delta, cost (3,) -> cost, whose gradients are minus their entries of delta."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, delta: Tensor, cost: Tensor) -> Tensor:
        ctx.save_for_backward(delta)
        ctx.dtype = logits.dtype
        return cost.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (delta,) = ctx.saved_tensors
        scale = torch.cat((grad[:1].expand(4), grad[1:2], grad[2:].expand(delta.shape[-1] - 5)))
        return (-delta * scale).to(ctx.dtype), None, None  # scaled first: a loss scale may overflow float16


class _DarknetLayer:
    """darknet's [yolo] layer in training, with one row for each anchor of each cell, R = N * A * H * W.

    output, delta: (R, 5 + C), as darknet's l.output and l.delta: x and y are offsets in the cell, w and h raw (after
    the logistic with new_coords), objectness and classes probabilities. boxes (R, 4), gt (M, 4): centre and sides as
    shares of the image. The methods follow the order of yolo_layer.c (process_batch, averages_yolo_deltas,
    forward_yolo_layer). Their arguments rows and target (P,) are pairs of a row and an index into the targets.
    """

    def __init__(self, head: RawHead, targets: Targets, label_smooth_eps: float) -> None:
        self.head, self.spec, self.targets = head, head.spec, targets
        logits = at_least_float32(head.logits.flatten(1, 3))
        self.anchors = anchor_grid([head], logits.dtype)  # of the rows of one image
        cell, anchor_px, _, _ = grid_parts(self.anchors)
        output = logits.sigmoid()
        if not self.spec.new_coords:
            output[..., 2:4] = logits[..., 2:4]
        output[..., :2] = output[..., :2] * self.spec.scale_x_y - (self.spec.scale_x_y - 1) / 2
        self.grid = constant_like(head.grid_hw[::-1], like=output)  # width and height in cells
        self.input = self.grid * constant_like(head.stride_px[::-1], like=output)  # and in pixels
        sides = 4 * output[..., 2:4].square() if self.spec.new_coords else output[..., 2:4].exp()
        centres = (cell + output[..., :2]) / self.grid
        self.boxes = torch.cat((centres, sides * anchor_px / self.input), dim=-1).flatten(0, 1)
        self.output = output.flatten(0, 1)
        self.delta = torch.zeros_like(self.output)
        self.corners_px = corners = to_device_async(targets.boxes, like=output).to(output.dtype)
        sides = corners[:, 2:] - corners[:, :2]
        self.gt = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, sides), dim=1) / self.input.repeat(2)
        self.labels = to_device_async(targets.labels, like=output)
        self.class_weight = constant_like(class_multipliers(self.spec), like=output)[self.labels]
        self.eps = label_smooth_eps

    def set_negatives(self) -> None:
        """Objectness target 0 for all rows but those ignored: best overlap above ignore_thresh, and sure of a class.

        With objectness_smooth the overlap is the target of the latter.
        """
        spec, p = self.spec, self.output[:, 4]
        boxes = self._corners_px(self.boxes).view(*self.head.logits.shape[:4], 4)
        class_sure = (self.output[:, 5:] > CLASS_SURE).any(1)
        overlap = best_overlap(boxes, self.targets).flatten() * class_sure
        target = torch.where(overlap > spec.ignore_thresh, overlap if spec.objectness_smooth else p, 0)
        self.delta[:, 4] = spec.obj_normalizer * (target - p)
        # All known cfgs have truth_thresh=1, which only rounding could exceed.
        if spec.truth_thresh < 1:
            self._add_by_truth_thresh(*(best.flatten() for best in best_target(boxes, self.targets)))

    def _add_by_truth_thresh(self, overlap: Tensor, target: Tensor) -> None:
        """Make rows positive whose IoU (R,) with their best target (R,) exceeds truth_thresh."""
        rows = (overlap > self.spec.truth_thresh).nonzero()[:, 0]
        target = target[rows]
        self._add_box(rows, target)
        self._set_classes(rows, target)
        objectness = torch.ones_like(overlap[rows])
        if self.spec.objectness_smooth:
            objectness = overlap[rows].square()
            entry = rows, 5 + self.labels[target]
            self.delta[entry] = self.class_weight[target] * (objectness - self.output[entry])
        self.delta[rows, 4] = self.spec.obj_normalizer * (objectness - self.output[rows, 4])

    def add_positives(self, rows: Tensor, target: Tensor) -> None:
        """Each row may occur once: the delta of a second target depends on the delta of the first."""
        self._add_box(rows, target)
        self._set_classes(rows, target)
        objectness = self.class_weight[target] * self.spec.obj_normalizer * (1 - self.output[rows, 4])
        if self.spec.objectness_smooth:
            objectness = torch.where(self.delta[rows, 4] == 0, objectness, self.delta[rows, 4])
        self.delta[rows, 4] = objectness

    def average(self) -> None:
        """Divide the box deltas, sums over a row's targets, by its number of positive class deltas."""
        if self.spec.iou_thresh < 1:
            classes = (self.delta[:, 5:] > 0).sum(1, keepdim=True).clamp(min=1)
            self.delta[:, :4] /= torch.where(self.delta[:, 4:5] != 0, classes, 1)

    def cost(self, rows: Tensor, target: Tensor) -> Tensor:
        """Return (3,) box, objectness, classes, for the positives `rows` of `target`."""
        squares = self.delta.square().sum(0)
        cost = torch.stack((squares[:4].sum(), squares[4], squares[5:].sum()))
        if self.spec.iou_loss == "mse":
            return cost
        cost = cost * self.spec.obj_normalizer
        cost[:1] = 0
        if len(rows):
            kind = "giou" if self.spec.iou_loss == "giou" else "iou"
            boxes = self._corners_px(self.boxes[rows].clamp(max=MAX_SIDE))
            cost[0] = self.spec.iou_normalizer * iou_loss(boxes, self.corners_px[target], kind).mean()
        return cost

    def _corners_px(self, boxes: Tensor) -> Tensor:
        """(P, 4) centre and sides as shares of the image -> (P, 4) xyxy in input pixels"""
        centre, sides = boxes[:, :2], boxes[:, 2:]
        return torch.cat((centre - sides / 2, centre + sides / 2), dim=1) * self.input.repeat(2)

    def _set_classes(self, rows: Tensor, target: Tensor) -> None:
        """Set the class deltas (delta_yolo_class): of all classes for a row's first target, else of its class only."""
        spec, label = self.spec, self.labels[target]
        p, delta, weight = self.output[rows, 5:], self.delta[rows, 5:], self.class_weight[target][:, None]
        is_label = label[:, None] == torch.arange(spec.classes, device=label.device)
        is_further = delta.gather(1, label[:, None]) != 0
        if spec.focal_loss:
            pt = p.gather(1, label[:, None]) + 1e-15
            focus = -(1 - pt) * (2 * pt * pt.log() + pt - 1)
            first = 0.5 * focus * (is_label.to(p.dtype) - p)
        else:
            first = is_label.to(p.dtype) * (1 - self.eps) + self.eps / 2 - p
            if spec.counters_per_class:
                # Without counters_per_class, cls_normalizer has no effect.
                first = torch.where(is_label, first * weight * spec.cls_normalizer, first)
        further = torch.where(is_label, (1 - self.eps / 2 - p) * weight, delta)
        self.delta[rows, 5:] = torch.where(is_further, further, first)

    def _add_box(self, rows: Tensor, target: Tensor) -> None:
        """Add the box deltas (delta_yolo_box)."""
        spec, output = self.spec, self.output[rows, :4]
        weight = spec.iou_normalizer * self.class_weight[target][:, None]
        if spec.iou_loss == "mse":
            area = self.gt[target, 2:].prod(1, keepdim=True)
            self.delta[rows, :4] += (2 - area) * weight * (self._encoded(rows, target) - output)
            return
        step = weight * iou_grad(self.boxes[rows], self.gt[target], spec.iou_loss)
        if not spec.new_coords:
            step[:, 2:] *= output[:, 2:].exp()
        step = torch.where(step.isfinite(), step, 0)
        self.delta[rows, :4] += step.clamp(-spec.max_delta, spec.max_delta)

    def _encoded(self, rows: Tensor, target: Tensor) -> Tensor:
        """Return the output (P, 4) for which each row's box would equal its target's."""
        cell, anchor_px, _, _ = grid_parts(self.anchors[rows % len(self.anchors)])
        ratio = self.gt[target, 2:] * self.input / anchor_px
        sides = (ratio / 4).sqrt() if self.spec.new_coords else ratio.log()
        return torch.cat((self.gt[target, :2] * self.grid - cell, sides), dim=1)


def _turns(rows: Tensor) -> Iterator[Tensor]:
    """Yield indices into rows (P,): first of every row's first occurrence, then of every second one ..."""
    order = rows.argsort(stable=True)
    ranked = rows[order]
    turn = torch.empty_like(rows)
    turn[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ranked, ranked)
    for number in range(int(turn.max()) + 1 if len(rows) else 0):
        yield (turn == number).nonzero()[:, 0]
