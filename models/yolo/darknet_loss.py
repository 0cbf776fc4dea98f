"""darknet's own training signal: its deltas, which are no loss's gradient, applied as one.

darknet (yolo_layer.c, box.c) writes for each output a delta, what gradient ascent should add, and prints a cost
beside it that the deltas are not derived from. What differs from the gradient of `loss.py`:

- a box's delta is nearly the derivative of IoU (`ascent.py`) to x, y, w, h as shares of the image; of the decoder
  only exp(tw) and exp(th) are chained, not the sigmoid, scale_x_y, the grid or the anchor;
- a cell is spared only where it is also sure (over 0.25) of some class;
- a further object in the same place asks for its own class alone, so that the others may stay;
- with objectness_smooth an answering anchor that does not cover its object well is still told 0;
- with new_coords the deltas pass through the logistic before the head, as those of a squared error do.

Crowd regions, which darknet does not know, may be covered as objects may, by the share of a box inside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfg.layers import YoloSpec
from models.transfer import constant_like, to_device_async
from models.yolo.anchor_grid import cell_grid
from models.yolo.assign import Assignment, assign, best_object, best_overlap
from models.yolo.coder import at_least_float32
from models.yolo.darknet_iou_grad import iou_ascent
from models.yolo.head import RawHead
from models.yolo.iou_loss import iou_loss
from models.yolo.loss import LossOptions, LossTerms
from utils.errors import UserError
from utils.structures import Targets

CLASS_SURE = 0.25
MAX_SIDE = 1e15  # images; of larger boxes IoU and GIoU are the same to float32, but their areas overflow it


class DarknetLoss:
    """A criterion like YoloLoss whose backward is minus darknet's delta, summed over the mini-batch.

    The values of its LossTerms add up to the cost that darknet prints for the mini-batch, not divided by its images:
    box is iou_normalizer * mean of 1 - IoU (GIoU with iou_loss=giou) over the assignments, objectness and classes
    obj_normalizer * the squared deltas of those entries (with iou_loss=mse all three are squared deltas, without the
    factor); each is the mean over the heads (yolo_layer.c, the end of forward_yolo_layer). Each term's gradient is its
    own entries' deltas.
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
            terms.append(torch.stack(_DeltaAsGradient.apply(head.logits, delta, cost / len(heads))))
        box, objectness, classes = torch.stack(terms).sum(0).unbind()
        return LossTerms(box=box, objectness=objectness, classes=classes)


@torch.no_grad()
def head_deltas(head: RawHead, targets: Targets, *, label_smooth_eps: float) -> tuple[Tensor, Tensor]:
    """darknet's delta to each logit (N, A, H, W, 5 + C), float32 at least, and its cost (3,) as in DarknetLoss."""
    cells = _Cells(head, targets, label_smooth_eps)
    cells.background()
    assignment = assign(targets, head.spec, head.grid_hw, head.stride_px)
    rows = cells.rows_of(assignment)
    for turn in _turns(rows):
        cells.answer(
            to_device_async(rows[turn], like=cells.said), to_device_async(assignment.target[turn], like=cells.said)
        )
    cells.average()
    rows, target = (to_device_async(each, like=cells.said) for each in (rows, assignment.target))
    delta, cost = cells.delta.view(head.logits.shape), cells.cost(rows, target)
    if head.spec.new_coords:
        # darknet's delta is to the output of the convolution's logistic, RawHead holds what goes into it.
        p = head.logits.to(delta.dtype).sigmoid()
        delta = delta * p * (1 - p)
    return delta * head.spec.delta_normalizer, cost


def class_multipliers(spec: YoloSpec) -> tuple[float, ...]:
    """How much more a class counts the rarer counters_per_class says it is, max_delta at most; else 1 each."""
    if not spec.counters_per_class:
        return (1.0,) * spec.classes
    most = max(spec.counters_per_class)
    return tuple(min(most / count, spec.max_delta) for count in spec.counters_per_class)


class _DeltaAsGradient(torch.autograd.Function):
    """logits, delta, cost (3,) -> the three costs, whose gradients to the logits are minus their share of delta."""

    @staticmethod
    def forward(ctx, logits: Tensor, delta: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(delta)
        ctx.dtype = logits.dtype
        box, objectness, classes = cost
        return box.clone(), objectness.clone(), classes.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, box: Tensor, objectness: Tensor, classes: Tensor) -> tuple[Tensor, None, None]:
        (delta,) = ctx.saved_tensors
        share = torch.stack((*[box] * 4, objectness, *[classes] * (delta.shape[-1] - 5)))
        return (-delta * share).to(ctx.dtype), None, None  # a loss scale may be too large for float16


class _Cells:
    """Every cell's every anchor of a head as one row, what it says, and its delta as it grows.

    said, delta: (R, 5 + C) with R = N * A * H * W; said is decoded as darknet's output: x and y as steps from the
    cell's corner, w and h raw, or their square roots with new_coords, objectness and classes as probabilities.
    boxes: (R, 4) centre and sides as shares of the image. The methods follow the order of yolo_layer.c
    (process_batch, averages_yolo_deltas, forward_yolo_layer).
    """

    def __init__(self, head: RawHead, targets: Targets, label_smooth_eps: float) -> None:
        self.head, self.spec, self.targets = head, head.spec, targets
        logits = at_least_float32(head.logits)
        said = logits.sigmoid()
        if not self.spec.new_coords:
            said[..., 2:4] = logits[..., 2:4]
        said[..., :2] = said[..., :2] * self.spec.scale_x_y - (self.spec.scale_x_y - 1) / 2
        height, width = self.head.grid_hw
        self.grid = constant_like((width, height), like=said)
        self.input = self.grid * constant_like(head.stride_px[::-1], like=said)  # width and height in pixels
        sides = 4 * said[..., 2:4].square() if self.spec.new_coords else said[..., 2:4].exp()
        sides = sides * head.anchors_px().to(said.dtype)[:, None, None] / self.input
        centres = (cell_grid(height, width, like=said) + said[..., :2]) / self.grid
        self.boxes = torch.cat((centres, sides), dim=-1).flatten(0, 3)
        self.said = said.flatten(0, 3)
        self.delta = torch.zeros_like(self.said)
        self.corners_px = corners = to_device_async(targets.boxes, like=said).to(said.dtype)  # of the objects
        sides = corners[:, 2:] - corners[:, :2]
        self.truths = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, sides), dim=1) / self.input.repeat(2)
        self.labels = to_device_async(targets.labels, like=said)
        self.importance = constant_like(class_multipliers(self.spec), like=said)[self.labels]
        self.eps = label_smooth_eps

    def background(self) -> None:
        """Every row says that there is nothing, unless it covers something; then it may say what it likes."""
        spec, p = self.spec, self.said[:, 4]
        boxes = self._corners_px(self.boxes).view(*self.head.logits.shape[:4], 4)
        class_sure = (self.said[:, 5:] > CLASS_SURE).any(1)
        match = best_overlap(boxes, self.targets).flatten() * class_sure
        wanted = torch.where(match > spec.ignore_thresh, match if spec.objectness_smooth else p, 0)
        self.delta[:, 4] = spec.obj_normalizer * (wanted - p)
        # At truth_thresh=1, every cfg's, only the rounding of an exact hit could reach it.
        if spec.truth_thresh < 1:
            self._answer_where_covering(*(found.flatten() for found in best_object(boxes, self.targets)))

    def _answer_where_covering(self, overlap: Tensor, target: Tensor) -> None:
        """Rows that cover an object beyond truth_thresh answer for it, whoever else does."""
        rows = (overlap > self.spec.truth_thresh).nonzero()[:, 0]
        target = target[rows]
        self._pull_box(rows, target)
        self._ask_class(rows, target)
        wanted = torch.ones_like(overlap[rows])
        if self.spec.objectness_smooth:
            wanted = overlap[rows].square()
            entry = rows, 5 + self.labels[target]
            self.delta[entry] = self.importance[target] * (wanted - self.said[entry])
        self.delta[rows, 4] = self.spec.obj_normalizer * (wanted - self.said[rows, 4])

    def answer(self, rows: Tensor, target: Tensor) -> None:
        """rows (P,), each once: the objects of a place come one after the other, because each changes what the next
        one finds there."""
        self._pull_box(rows, target)
        self._ask_class(rows, target)
        something = self.importance[target] * self.spec.obj_normalizer * (1 - self.said[rows, 4])
        if self.spec.objectness_smooth:
            something = torch.where(self.delta[rows, 4] == 0, something, self.delta[rows, 4])
        self.delta[rows, 4] = something

    def average(self) -> None:
        """Where several classes are wanted, their boxes have been added up."""
        if self.spec.iou_thresh < 1:
            classes = (self.delta[:, 5:] > 0).sum(1, keepdim=True).clamp(min=1)
            self.delta[:, :4] /= torch.where(self.delta[:, 4:5] != 0, classes, 1)

    def cost(self, rows: Tensor, target: Tensor) -> Tensor:
        """(3,) box, objectness, classes; rows (P,) answer for `target`."""
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

    def rows_of(self, assignment: Assignment) -> Tensor:
        """(P,), on the host"""
        _, anchors, height, width = self.head.logits.shape[:4]
        image, anchor, row, column = assignment.place
        return ((image * anchors + anchor) * height + row) * width + column

    def _corners_px(self, boxes: Tensor) -> Tensor:
        """(P, 4) centre and sides as shares of the image -> (P, 4) xyxy in input pixels"""
        centre, sides = boxes.split(2, dim=1)
        return torch.cat((centre - sides / 2, centre + sides / 2), dim=1) * self.input.repeat(2)

    def _ask_class(self, rows: Tensor, target: Tensor) -> None:
        """delta_yolo_class: rows (P,), each once, say class `labels[target]`; the first to ask says what the others
        are not."""
        spec, label = self.spec, self.labels[target]
        p, delta, importance = self.said[rows, 5:], self.delta[rows, 5:], self.importance[target][:, None]
        own = label[:, None] == torch.arange(spec.classes, device=label.device)
        asked = delta.gather(1, label[:, None]) != 0
        if spec.focal_loss:
            pt = p.gather(1, label[:, None]) + 1e-15
            focus = -(1 - pt) * (2 * pt * pt.log() + pt - 1)
            first = 0.5 * focus * (own.to(p.dtype) - p)
        else:
            first = own.to(p.dtype) * (1 - self.eps) + self.eps / 2 - p
            if spec.counters_per_class:
                # Without counters_per_class, cls_normalizer has no effect.
                first = torch.where(own, first * importance * spec.cls_normalizer, first)
        further = torch.where(own, (1 - self.eps / 2 - p) * importance, delta)
        self.delta[rows, 5:] = torch.where(asked, further, first)

    def _pull_box(self, rows: Tensor, target: Tensor) -> None:
        """delta_yolo_box: rows (P,), each once, move their boxes towards those of `target`."""
        spec, said = self.spec, self.said[rows, :4]
        weight = spec.iou_normalizer * self.importance[target][:, None]
        if spec.iou_loss == "mse":
            truth = self.truths[target]
            area = truth[:, 2:].prod(1, keepdim=True)
            self.delta[rows, :4] += (2 - area) * weight * (self._raw_truths(rows, target) - said)
            return
        step = weight * iou_ascent(self.boxes[rows], self.truths[target], spec.iou_loss)
        if not spec.new_coords:
            step[:, 2:] *= said[:, 2:].exp()
        step = torch.where(step.isfinite(), step, 0)
        self.delta[rows, :4] += step.clamp(-spec.max_delta, spec.max_delta)

    def _raw_truths(self, rows: Tensor, target: Tensor) -> Tensor:
        """(P, 4) what `said` would be of a row whose box is the target's."""
        _, anchors, height, width = self.head.logits.shape[:4]
        cells = torch.stack((rows % width, rows // width % height), dim=1)
        sizes_px = self.head.anchors_px().to(self.said.dtype)[rows // (width * height) % anchors]
        ratio = self.truths[target, 2:] * self.input / sizes_px
        sides = (ratio / 4).sqrt() if self.spec.new_coords else ratio.log()
        return torch.cat((self.truths[target, :2] * self.grid - cells, sides), dim=1)


def _turns(rows: Tensor) -> Iterator[Tensor]:
    """Indices into rows (P,) such that within a turn no row occurs twice, and each row's first occurrence comes in
    the first turn, its second in the second ..."""
    order = rows.argsort(stable=True)
    ranked = rows[order]
    turn = torch.empty_like(rows)
    turn[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ranked, ranked)
    for number in range(int(turn.max()) + 1 if len(rows) else 0):
        yield (turn == number).nonzero()[:, 0]
