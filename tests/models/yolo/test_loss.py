"""The loss: its gradient, sums and targets; and that the cut of a batch does not change the gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou

from cfg.plan import load_plan
from cfg.yolo import IOU_LOSSES, YoloSpec
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.yolo.assign import assign, best_overlap
from models.yolo.coder import decode, decode_head, encode
from models.yolo.head import RawHead
from models.yolo.loss import LossOptions, LossTerms, YoloLoss
from tests.models.yolo.grids import grid_of
from tests.reference.yolo_loss import yolo_loss
from utils.clock import BatchClock
from utils.structures import Batch, Targets

ANCHORS = ((10.0, 14.0), (22.0, 17.0), (30.0, 40.0))
SPEC = YoloSpec(anchors=ANCHORS, mask=(0, 1), classes=3, iou_loss="ciou", ignore_thresh=0.6, scale_x_y=1.1)
GRID, STRIDE = (3, 4), (16.0, 8.0)  # input 48 x 32
CLASSES = slice(5, None)


def targets_of(boxes=(), labels=(), image_index=(), is_crowd=None, dtype=torch.float64) -> Targets:
    return Targets(
        boxes=torch.tensor(boxes, dtype=dtype).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
        image_index=torch.tensor(image_index, dtype=torch.long),
        is_crowd=torch.tensor([False] * len(labels) if is_crowd is None else is_crowd, dtype=torch.bool),
    )


NOTHING = targets_of()
SOME = targets_of(
    [[3, 4, 14, 19], [9, 21, 30, 37], [12, 18, 20, 35], [1, 2, 30, 45]],
    labels=[0, 2, 1, 1],
    image_index=[0, 0, 1, 1],
    is_crowd=[False, False, False, True],
)


def random_logits(images: int = 2, dtype=torch.float64) -> torch.Tensor:
    return (torch.randn(images, 2, *GRID, 8, dtype=torch.float64) * 0.7).to(dtype).requires_grad_()


def loss_of(logits, targets, spec=SPEC, options=None, stride_px=STRIDE) -> LossTerms:
    return YoloLoss(options or LossOptions())([RawHead(logits=logits, spec=spec, stride_px=stride_px)], targets)


def bce(logit: float, target: float) -> float:
    return target * math.log1p(math.exp(-logit)) + (1 - target) * math.log1p(math.exp(logit))


# --- concatenated heads ------------------------------------------------------------------------------------------


def random_heads(*specs: YoloSpec, images: int = 3) -> list[RawHead]:
    """Each of half the grid of the one before, as wide as high in pixels."""
    return [
        RawHead(
            logits=(torch.randn(images, len(spec.mask), 8 >> at, 12 >> at, 8, dtype=torch.float64)).requires_grad_(),
            spec=spec,
            stride_px=(8.0 * 2**at, 8.0 * 2**at),
        )
        for at, spec in enumerate(specs)
    ]


def random_targets(count: int, images: int = 3) -> Targets:
    corner = torch.rand(count, 2, dtype=torch.float64) * torch.tensor([80.0, 50.0])
    return Targets(
        boxes=torch.cat((corner, corner + 2 + torch.rand(count, 2, dtype=torch.float64) * 60), dim=1),
        labels=torch.randint(0, 3, (count,)),
        image_index=torch.randint(0, images, (count,)),
        is_crowd=torch.rand(count) < 0.2,
    )


@pytest.mark.parametrize("objects", [0, 1, 12])
@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"iou_loss": "mse"},
        {"new_coords": True, "iou_loss": "giou"},
        {"objectness_smooth": True, "label_smooth_eps": 0.1, "iou_thresh": 0.3},
        {"iou_normalizer": 0.07, "obj_normalizer": 0.4, "cls_normalizer": 0.5},
    ],
)
def test_concatenated_heads_have_the_loss_and_gradient_that_they_have_one_by_one(rules, objects):
    spec = replace(SPEC, mask=(0,), **rules)
    # The last one has different settings, so it is not concatenated with the others.
    own = replace(spec, mask=(1, 2), ignore_thresh=0.2, iou_loss="diou")
    heads = random_heads(spec, replace(spec, mask=(2, 1), scale_x_y=1.3), own)
    targets, options = random_targets(objects), LossOptions()
    made, expected = YoloLoss(options)(heads, targets).detached(), yolo_loss(heads, targets, options)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    logits = [head.logits for head in heads]
    grads = torch.autograd.grad(YoloLoss(options)(heads, targets).total, logits)
    for ours, theirs in zip(grads, torch.autograd.grad(expected.sum(), logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Kernels(TorchDispatchMode):
    """Counts what a GPU would have to start: all operators but views."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view and operator is not torch.ops.aten.detach.default
        return operator(*args, **(kwargs or {}))


def test_more_heads_are_hardly_more_kernels():
    def kernels(*specs: YoloSpec) -> int:
        heads, targets = random_heads(*specs, images=1), random_targets(4, images=1)
        YoloLoss(LossOptions())(heads, targets)  # builds the anchor grid
        with Kernels() as counted:
            YoloLoss(LossOptions())(heads, targets).total.backward()
        return counted.count

    one, three = kernels(SPEC), kernels(SPEC, SPEC, replace(SPEC, scale_x_y=1.2))
    apart = kernels(*(replace(SPEC, cls_normalizer=float(n)) for n in (1, 2, 3)))
    assert one < three < 1.5 * one < 2.5 * one < apart


# --- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("iou_loss", ["giou", "diou", "iou", "mse"])
def test_gradcheck(iou_loss, new_coords):
    spec = replace(SPEC, iou_loss=iou_loss, new_coords=new_coords, label_smooth_eps=0.1)
    logits = random_logits()
    assert torch.autograd.gradcheck(lambda x: loss_of(x, SOME, spec).total, (logits,), fast_mode=True)


@pytest.mark.parametrize("new_coords", [False, True])
def test_ciou_is_diou_and_the_aspect_term_with_a_constant_weight(new_coords):
    """The gradient of CIoU holds alpha constant (Zheng et al. 2020, section 3.3), so gradcheck does not apply."""
    logits = random_logits()
    ciou, diou = (replace(SPEC, iou_loss=kind, new_coords=new_coords) for kind in ("ciou", "diou"))
    made = loss_of(logits, SOME, ciou).box
    boxes = decode_head(RawHead(logits=logits, spec=ciou, stride_px=STRIDE))
    pairs = assign(SOME, ciou, GRID, STRIDE)
    predicted, target = boxes[pairs.index], SOME.boxes[pairs.target]
    angles = [torch.atan((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])) for b in (predicted, target)]
    v = 4 / math.pi**2 * (angles[1] - angles[0]).square()
    alpha = (v / (1 - box_iou(predicted, target).diagonal() + v)).detach()
    expected = loss_of(logits, SOME, diou).box + LossOptions().box_gain * ciou.iou_normalizer * (alpha * v).sum()
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (made, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("smooth", [False, True])
def test_no_objects_leave_objectness_only_and_every_logit_a_gradient(smooth):
    spec = replace(SPEC, objectness_smooth=smooth)
    logits = random_logits()
    terms = loss_of(logits, NOTHING, spec)
    assert terms.box.item() == terms.classes.item() == 0
    assert terms.objectness.item() == pytest.approx(sum(bce(t, 0) for t in logits[..., 4].flatten().tolist()))
    terms.total.backward()
    assert logits.grad is not None and logits.grad[..., 4].all()
    assert not logits.grad[..., :4].any() and not logits.grad[..., CLASSES].any()


def test_a_head_without_objects_still_reaches_its_logits():
    logits = [random_logits(), random_logits()]
    specs = [SPEC, replace(SPEC, mask=(2,) * 2)]  # no object has the shape of anchor 2
    heads = [RawHead(logits=x, spec=s, stride_px=STRIDE) for x, s in zip(logits, specs, strict=True)]
    terms = YoloLoss(LossOptions())(heads, SOME)
    for term in (terms.box, terms.objectness, terms.classes):
        grads = torch.autograd.grad(term, logits, retain_graph=True, allow_unused=True)
        assert term is terms.objectness or all(g is not None for g in grads)


DEGENERATE = {
    "thin": [5, 5, 6, 45],
    "flat": [1, 20, 31, 21],
    "tiny": [10, 10, 11, 11],
    "speck": [10, 10, 10.001, 10.001],
    "huge": [-5000, -5000, 9000, 9000],
}


@pytest.mark.parametrize("wild", [0.0, 100.0, -100.0, -9.0])
@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("iou_loss", IOU_LOSSES)
def test_degenerate_boxes_and_wild_logits_stay_finite(iou_loss, new_coords, wild):
    spec = replace(SPEC, iou_loss=iou_loss, new_coords=new_coords)
    for name, box in DEGENERATE.items():
        for columns in ([2], [3], [2, 3], [0, 1, 2, 3, 4]):
            logits = torch.zeros(1, 2, *GRID, 8)
            logits[..., columns] = wild
            logits.requires_grad_()
            total = loss_of(logits, targets_of([box], [0], [0], dtype=torch.float32), spec).total
            total.backward()
            assert torch.isfinite(total) and torch.isfinite(logits.grad).all(), (name, columns)


def test_the_loss_is_in_single_precision_whatever_the_logits():
    logits = random_logits(dtype=torch.bfloat16)
    total = loss_of(logits, SOME).total
    total.backward()
    assert total.dtype == torch.float32 or total.dtype == torch.float64  # the targets' own
    assert logits.grad.dtype == torch.bfloat16 and torch.isfinite(logits.grad).all()


# --- sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iou_loss", IOU_LOSSES)
def test_the_loss_of_a_batch_is_the_sum_over_its_images(iou_loss):
    spec = replace(SPEC, iou_loss=iou_loss, objectness_smooth=True)
    logits = random_logits(3)  # the third image is empty
    whole = loss_of(logits, SOME, spec).detached()
    parts = [loss_of(logits[i : i + 1], SOME.of_images(i, i + 1), spec).detached() for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=1e-12, atol=1e-12)
    assert (whole > 0).all()


def test_the_loss_of_heads_is_the_sum_over_heads():
    heads = [
        RawHead(logits=random_logits(), spec=SPEC, stride_px=STRIDE),
        RawHead(logits=random_logits(), spec=replace(SPEC, mask=(1, 2)), stride_px=STRIDE),
    ]
    criterion = YoloLoss(LossOptions())
    both = criterion(heads, SOME).detached()
    torch.testing.assert_close(both, sum(criterion([head], SOME).detached() for head in heads))


@pytest.mark.parametrize("iou_loss", ["ciou", "mse"])
def test_the_normalizers_scale_the_terms(iou_loss):
    plain = replace(SPEC, iou_loss=iou_loss, iou_normalizer=1.0)
    scaled = replace(plain, iou_normalizer=0.5, obj_normalizer=3.0, cls_normalizer=7.0)
    logits = random_logits()
    once, more = loss_of(logits, SOME, plain).detached(), loss_of(logits, SOME, scaled).detached()
    torch.testing.assert_close(more / once, torch.tensor([0.5, 3.0, 7.0], dtype=torch.float64))


def test_the_box_gain_scales_iou_losses_and_not_the_squared_error():
    logits = random_logits()
    for kind, factor in (("giou", 4.0), ("mse", 1.0)):
        spec = replace(SPEC, iou_loss=kind)
        boxes = [loss_of(logits, SOME, spec, LossOptions(box_gain=gain)).box.item() for gain in (2.0, 8.0)]
        assert boxes[1] == pytest.approx(factor * boxes[0])


# --- the box -------------------------------------------------------------------------------------------------


def perfect_logits(targets: Targets, spec: YoloSpec, sure: float = 20.0) -> torch.Tensor:
    """Logits that predict exactly `targets`, and nothing elsewhere."""
    logits = torch.zeros(2, 2, *GRID, 8, dtype=torch.float64)
    logits[..., 4:] = -sure
    pairs = assign(targets, spec, GRID, STRIDE)
    _, anchor, row, column = pairs.index
    cells = torch.stack((column, row), dim=1).double()
    anchors = torch.tensor(ANCHORS, dtype=torch.float64)[list(spec.mask)][anchor]
    logits[(*pairs.index, slice(0, 4))] = encode(targets.boxes[pairs.target], **grid_of(cells, anchors, STRIDE, spec))
    logits[(*pairs.index, 4)] = sure
    logits[(*pairs.index, 5 + targets.labels[pairs.target])] = sure
    return logits


@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("iou_loss", IOU_LOSSES)
def test_a_perfect_prediction_costs_nearly_nothing(iou_loss, new_coords):
    spec = replace(SPEC, iou_loss=iou_loss, new_coords=new_coords)
    logits = perfect_logits(SOME, spec)
    assert loss_of(logits, SOME, spec).detached().max() < 1e-4
    moved = logits.clone()
    moved[..., 0] += 1
    assert loss_of(moved, SOME, spec).box > 1e-2


def test_the_squared_error_by_hand():
    spec = replace(SPEC, iou_loss="mse", scale_x_y=1.0, iou_normalizer=1.0)
    logits = torch.zeros(1, 2, *GRID, 8, dtype=torch.float64)
    # Centre in the middle of cell (1, 1) and so at logit 0 of x and y; e times anchor 0 in width, as high as it.
    width = 10 * math.e
    target = targets_of([[12 - width / 2, 24 - 7, 12 + width / 2, 24 + 7]], [0], [0])
    spec = replace(spec, mask=(0, 0), anchors=ANCHORS[:1])
    boxes = loss_of(logits, target, spec).box
    # Both of the head's anchors are the best one; each misses log width by 1.
    assert boxes.item() == pytest.approx(2 * 0.5 * (2 - width * 14 / (48 * 32)), rel=1e-6)


# --- objectness and classes ----------------------------------------------------------------------------------


def test_an_anchor_with_two_objects_has_both_classes_as_targets_once():
    logits = random_logits(1)
    same_cell = targets_of(
        [[3, 4, 14, 19], [3.5, 4, 14, 19], [3, 4.5, 14, 19]], labels=[0, 2, 2], image_index=[0, 0, 0]
    )
    pairs = assign(same_cell, SPEC, GRID, STRIDE)
    assert len(pairs.target) == 3 and len(set(zip(*(t.tolist() for t in pairs.index), strict=True))) == 1
    place = tuple(t[0].item() for t in pairs.index)
    terms = loss_of(logits, same_cell)
    output = logits[place].tolist()
    assert terms.classes.item() == pytest.approx(bce(output[5], 1) + bce(output[6], 0) + bce(output[7], 1))
    covers = best_overlap(decode_head(RawHead(logits=logits, spec=SPEC, stride_px=STRIDE)).detach(), same_cell) > 0.6
    expected = bce(output[4], 1) + sum(
        bce(logits[index].tolist()[4], 0) for index in map(tuple, (~covers).nonzero().tolist()) if index != place
    )
    assert terms.objectness.item() == pytest.approx(expected)


@pytest.mark.parametrize("is_crowd", [False, True])
def test_an_anchor_that_covers_an_object_well_is_ignored(is_crowd):
    box = [1, 2, 31, 45]
    target = targets_of([box], [0], [0], [is_crowd])
    logits = torch.full((1, 2, *GRID, 8), -3.0, dtype=torch.float64)
    neighbour = (0, 1, 1, 1)  # its anchor has not the best shape, its cell is not the centre's
    cell, anchor = torch.tensor([1.0, 1.0]).double(), torch.tensor(ANCHORS[1]).double()
    shifted = torch.tensor(box).double() - 1.5 * torch.tensor([1, 0, 1, 0])
    logits[neighbour][:4] = encode(shifted, **grid_of(cell, anchor, STRIDE, SPEC))
    logits.requires_grad_()
    assert best_overlap(decode_head(RawHead(logits=logits, spec=SPEC, stride_px=STRIDE)), target)[neighbour] > 0.8
    loss_of(logits, target).objectness.backward()
    assert logits.grad[neighbour][4] == 0
    others = logits.grad[..., 4].flatten().ne(0).sum().item()
    crowded = best_overlap(decode_head(RawHead(logits=logits, spec=SPEC, stride_px=STRIDE)), target) > 0.6
    assert others == (~crowded).sum().item() > 0
    logits.grad = None
    loss_of(logits, target, replace(SPEC, ignore_thresh=0.999 if not is_crowd else 1.0)).objectness.backward()
    assert logits.grad[neighbour][4] > 0


def test_with_objectness_smooth_the_overlap_is_a_lower_limit():
    box = [1, 2, 31, 45]
    target, spec = targets_of([box], [0], [0]), replace(SPEC, objectness_smooth=True)
    cell, anchor = torch.tensor([1.0, 1.0]).double(), torch.tensor(ANCHORS[1]).double()
    place = (0, 1, 1, 1)
    for logit, pulled in ((-2.0, True), (8.0, False)):
        logits = torch.full((1, 2, *GRID, 8), -3.0, dtype=torch.float64)
        logits[place][:4] = encode(torch.tensor(box).double() - 1.0, **grid_of(cell, anchor, STRIDE, spec))
        logits[place][4] = logit
        logits.requires_grad_()
        overlap = best_overlap(decode_head(RawHead(logits=logits, spec=spec, stride_px=STRIDE)), target)[place]
        loss_of(logits, target, spec).objectness.backward()
        expected = 1 / (1 + math.exp(-logit)) - overlap.item() if pulled else 0
        assert logits.grad[place][4].item() == pytest.approx(expected)


def test_a_positive_has_objectness_target_1_even_where_it_covers_well():
    logits = perfect_logits(SOME, SPEC)
    logits[..., 4] = -2
    logits.requires_grad_()
    loss_of(logits, SOME).objectness.backward()
    place = assign(SOME, SPEC, GRID, STRIDE).index
    assert logits.grad[(*place, 4)].tolist() == pytest.approx([1 / (1 + math.exp(2)) - 1] * len(place[0]))


@pytest.mark.parametrize(("flag", "cfg", "used"), [(None, 0.0, 0.0), (None, 0.2, 0.2), (0.1, 0.2, 0.1), (0.0, 0.2, 0)])
def test_label_smoothing_moves_the_class_targets(flag, cfg, used):
    one = targets_of([[3, 4, 14, 19]], [1], [0])
    logits = random_logits(1)
    place = tuple(t[0].item() for t in assign(one, SPEC, GRID, STRIDE).index)
    terms = loss_of(logits, one, replace(SPEC, label_smooth_eps=cfg), LossOptions(label_smoothing=flag))
    target = [used / 2, 1 - used / 2, used / 2]
    output = logits[place][CLASSES].tolist()
    assert terms.classes.item() == pytest.approx(sum(bce(t, w) for t, w in zip(output, target, strict=True)))


def test_a_crowd_has_no_positives():
    logits = random_logits()
    terms = loss_of(logits, targets_of([[3, 4, 14, 19]], [0], [0], [True]))
    assert terms.box.item() == terms.classes.item() == 0
    assert terms.objectness.item() > 0


def test_the_box_that_is_measured_is_the_one_decoded():
    logits = random_logits(1)
    one = targets_of([[3, 4, 14, 19]], [1], [0])
    spec = replace(SPEC, iou_loss="iou")
    image, anchor, row, column = (t[0].item() for t in assign(one, spec, GRID, STRIDE).index)
    raw = logits[image, anchor, row, column, :4]
    place = torch.tensor([float(column), float(row)]).double(), torch.tensor(ANCHORS[anchor]).double()
    iou = box_iou(decode(raw, **grid_of(*place, STRIDE, spec))[None], one.boxes).item()
    expected = LossOptions().box_gain * spec.iou_normalizer * (1 - iou)
    assert loss_of(logits, one, spec).box.item() == pytest.approx(expected, abs=1e-6)


# --- the gradient does not depend on the cut -----------------------------------------------------------------


def batch_of_eight(dtype) -> Batch:
    count = 20
    corner = torch.rand(count, 2) * 40
    return Batch(
        images=torch.rand(8, 3, 64, 64, dtype=torch.float64).to(dtype),
        targets=Targets(
            boxes=torch.cat((corner, corner + 4 + torch.rand(count, 2) * 20), dim=1),
            labels=torch.randint(0, 3, (count,)),
            image_index=torch.randint(0, 7, (count,)).sort().values,  # the last image is empty
            is_crowd=torch.rand(count) < 0.2,
        ),
        image_ids=tuple(range(8)),
        paths=("",) * 8,
        placements=(None,) * 8,
    )


def gradient(network: nn.Module, batch: Batch, parts: int) -> torch.Tensor:
    """Of the loss per image, as train.py makes it."""
    criterion = YoloLoss(LossOptions())
    network.zero_grad()
    cuts = 0
    for part in BatchClock(network).minibatches(batch.split(parts)):
        (criterion(network(part.pixels()), part.targets).total / len(batch)).backward()
        cuts += 1
    assert cuts == parts
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-10)])
def test_the_gradient_does_not_depend_on_the_cut(dtype, tolerance):
    plan = load_plan("yolov4-pico", classes=3, input_hw=(64, 64))
    network = Network(plan, norm_factory(NormOptions(norm="gn"))).to(dtype)
    batch = batch_of_eight(dtype)
    whole = gradient(network, batch, 1)
    assert whole.norm() > 0.1
    for parts in (2, 4, 8):
        difference = (gradient(network, batch, parts) - whole).norm() / whole.norm()
        assert difference < tolerance, f"{parts} mini-batches: {difference:.1e}"


def test_with_batch_norm_the_cut_does_matter():
    """Else the test above would see nothing."""
    plan = load_plan("yolov4-pico", classes=3, input_hw=(64, 64))
    network = Network(plan, norm_factory(NormOptions(norm="bn")))
    batch = batch_of_eight(torch.float32)
    whole = gradient(network, batch, 1)
    assert (gradient(network, batch, 4) - whole).norm() > 1e-2 * whole.norm()
