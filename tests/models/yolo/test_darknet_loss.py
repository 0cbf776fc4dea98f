"""darknet's deltas: as darknet wrote them, as the slow oracle has them, and of what they are derivatives."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from cfg.yolo import IOU_LOSSES, IOU_THRESH_KINDS, YoloSpec
from models.yolo.assign import assign
from models.yolo.criterion import CRITERIA, make_criterion
from models.yolo.darknet_iou_grad import iou_grad
from models.yolo.darknet_loss import DarknetLoss, head_deltas
from models.yolo.head import RawHead
from models.yolo.loss import LossOptions, LossTerms, YoloLoss
from tests.models.yolo.recorded import (
    Recorded,
    fixture_cases,
    golden_case,
    golden_names,
    head_of,
    output_delta,
    targets_of,
)
from tests.reference.darknet_loss import Truth, box_ascent, yolo_layer
from utils.errors import UserError
from utils.structures import Targets

DARKNET = LossOptions(loss="darknet")
ANCHORS = ((10.0, 14.0), (22.0, 17.0), (30.0, 40.0))
SPEC = YoloSpec(
    anchors=ANCHORS, mask=(0, 1), classes=3, iou_loss="ciou", iou_normalizer=0.07, ignore_thresh=0.5, scale_x_y=1.1
)
GRID, INPUT_HW = (3, 4), (48, 32)


def train_on(case: Recorded, dtype: torch.dtype) -> tuple[np.ndarray, float]:
    """darknet's delta and cost, as a training gets them from DarknetLoss."""
    head = head_of(case.x, case.spec, case.input_hw, dtype)
    terms = DarknetLoss(DARKNET)([head], targets_of(case.truths, case.input_hw, dtype))
    terms.total.backward()
    return output_delta(head.logits.grad, case.x, case.spec), terms.total.item()


def assert_is_darknets(case: Recorded) -> None:
    """The product in single precision, as it trains, and the oracle."""
    delta, cost = train_on(case, torch.float32)
    expected, parts = yolo_layer(case.x, case.truths, case.spec, case.input_hw)
    assert np.abs(delta - case.delta).max() < 1e-5
    assert np.abs(expected - case.delta).max() < 1e-5
    if case.cost is not None:
        assert cost == pytest.approx(case.cost, rel=1e-6)
        assert sum(parts.values()) == pytest.approx(case.cost, rel=1e-6)


@pytest.mark.parametrize("name", golden_names())
def test_the_deltas_are_darknets(name):
    assert_is_darknets(golden_case(name))


def test_all_recorded_deltas_and_costs_are_darknets(shared: Path):
    cases = fixture_cases(shared)
    assert len(cases) == 23
    for case in cases.values():
        assert_is_darknets(case)


# --- against the oracle --------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "extra-anchors": {"iou_thresh": 0.2},
    **{f"extra-anchors-{kind}": {"iou_thresh": 0.1, "iou_thresh_kind": kind} for kind in IOU_THRESH_KINDS[1:]},
    "smooth": {"objectness_smooth": True, "obj_normalizer": 0.4},
    "covering": {"truth_thresh": 0.4, "iou_thresh": 0.2},
    "covering-smooth": {"truth_thresh": 0.4, "objectness_smooth": True, "counters_per_class": (9, 1, 4)},
    "clipped": {"max_delta": 0.02, "iou_normalizer": 0.75},
    "focal": {"focal_loss": True, "iou_thresh": 0.2},
    "label-smoothing": {"label_smooth_eps": 0.1, "iou_thresh": 0.2},
    "counters": {"counters_per_class": (100, 10, 40), "cls_normalizer": 0.5, "max_delta": 3.0},
    "normalizers": {"iou_normalizer": 0.3, "obj_normalizer": 4.0, "cls_normalizer": 0.5},
    "low-ignore-thresh": {"ignore_thresh": 0.05},
    "everything": {
        "truth_thresh": 0.5,
        "iou_thresh": 0.1,
        "objectness_smooth": True,
        "max_delta": 2.0,
        "counters_per_class": (7, 3, 1),
        "cls_normalizer": 0.5,
        "label_smooth_eps": 0.2,
        "delta_normalizer": 0.7,
    },
}


def random_case(spec: YoloSpec, *, sure: bool = False, seed: int = 0) -> tuple[np.ndarray, list[list[Truth]]]:
    """Three images: one crowded, with objects that share a cell and a class, one with a few objects, one empty.

    Some of the objects lie close to some cell's prediction. sure: some probabilities are exactly 0 or 1.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (3, 2, 8, *GRID))
    x[:, :, 5:] -= 1  # about half of the cells are sure of no class
    if sure:
        output = x[:, :, 4:]
        output[:] = np.where(rng.random(output.shape) < 0.5, rng.choice([-1e3, 1e3], output.shape), 0.3)
    if spec.new_coords:
        x = 1 / (1 + np.exp(-x.clip(-700, 700)))
    truths = [[random_truth(rng) for _ in range(count)] for count in (6, 3, 0)]
    for _ in range(6):
        x_, y, w, h, label = truths[0][rng.integers(len(truths[0]))]
        truths[0].append((x_, y, w * rng.uniform(0.8, 1.2), h, label if rng.random() < 0.5 else int(rng.integers(3))))
    for image in (0, 1):
        truths[image] += [near_truth(x[image], spec, rng) for _ in range(4)]
    return x, truths


def random_truth(rng: np.random.Generator) -> Truth:
    width, height = rng.uniform(0.1, 0.9, 2)
    return (*rng.uniform(0.02, 0.98, 2).tolist(), float(width), float(height), int(rng.integers(3)))


def near_truth(x: np.ndarray, spec: YoloSpec, rng: np.random.Generator) -> Truth:
    """About the box that some cell predicts, by the decoder's formula."""
    a, row, column = (int(rng.integers(size)) for size in (2, *GRID))
    xy, wh = x[a, :4, row, column].reshape(2, 2)
    xy = xy if spec.new_coords else 1 / (1 + np.exp(-xy))
    wh = 4 * wh**2 if spec.new_coords else np.exp(wh)
    centre = ((np.array([column, row]) + xy) / GRID[::-1]).clip(0.01, 0.99)
    sides = wh * ANCHORS[a] / INPUT_HW[::-1] * rng.uniform(0.95, 1.05, 2)
    return (*centre.tolist(), *sides.tolist(), int(rng.integers(3)))


def assert_is_the_oracles(spec: YoloSpec, x: np.ndarray, truths: list[list[Truth]]) -> np.ndarray:
    expected, parts = yolo_layer(x, truths, spec, INPUT_HW)
    head = head_of(x, spec, INPUT_HW, torch.float64)
    terms = DarknetLoss(DARKNET)([head], targets_of(truths, INPUT_HW, torch.float64))
    terms.total.backward()
    if spec.new_coords:
        expected = expected * x * (1 - x)
    made = -head.logits.grad.permute(0, 1, 4, 2, 3).numpy()
    np.testing.assert_allclose(made, expected * spec.delta_normalizer, rtol=1e-7, atol=1e-9)
    assert terms.detached().tolist() == pytest.approx(list(parts.values()), rel=1e-6)
    return expected


@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("iou_loss", IOU_LOSSES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_deltas_are_the_oracles(options, iou_loss, new_coords):
    spec = replace(SPEC, iou_loss=iou_loss, new_coords=new_coords, **OPTIONS[options])
    x, truths = random_case(spec)
    delta = assert_is_the_oracles(spec, x, truths)
    boxes, objectness, classes = delta[:, :, :4], delta[:, :, 4], delta[:, :, 5:]
    assert boxes.any() and (objectness < 0).any() and (classes > 0).any()
    plain = plain_deltas(iou_loss, new_coords)
    assert options == "plain" or np.abs(delta - plain).max() > 1e-3, "the option does nothing here"


@cache
def plain_deltas(iou_loss: str, new_coords: bool) -> np.ndarray:
    """The oracle's of `random_case` without any option."""
    spec = replace(SPEC, iou_loss=iou_loss, new_coords=new_coords)
    x, truths = random_case(spec)
    delta, _ = yolo_layer(x, truths, spec, INPUT_HW)
    return delta * x * (1 - x) if new_coords else delta


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_the_deltas_of_many_random_cases_are_the_oracles(options):
    for seed in range(1, 21):
        for iou_loss in IOU_LOSSES:
            spec = replace(SPEC, iou_loss=iou_loss, new_coords=seed % 2 == 0, **OPTIONS[options])
            x, truths = random_case(spec, sure=seed % 5 == 0, seed=seed)
            assert assert_is_the_oracles(spec, x, truths).any()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_delta_of_exactly_0_counts_as_none(options):
    """darknet tells a first object from a further one, and a positive row, by a delta that is not 0."""
    spec = replace(SPEC, **OPTIONS[options])
    assert_is_the_oracles(spec, *random_case(spec, sure=True))


@pytest.mark.parametrize("iou_loss", IOU_LOSSES)
def test_the_order_of_objects_matters_as_it_does_in_darknet(iou_loss):
    """Two classes in one place: each order is the oracle's, and with counters_per_class they differ."""
    spec = replace(SPEC, iou_loss=iou_loss, counters_per_class=(100, 10, 40), cls_normalizer=0.5)
    x, _ = random_case(spec)
    pair = [(0.3, 0.4, 0.3, 0.3, 0), (0.31, 0.41, 0.32, 0.28, 2), (0.3, 0.4, 0.3, 0.31, 2)]
    made = [assert_is_the_oracles(spec, x[:1], [order]) for order in (pair, pair[::-1])]
    assert np.abs(made[0] - made[1]).max() > 1e-3


def test_no_objects_leave_objectness_only():
    x, _ = random_case(SPEC)
    delta = assert_is_the_oracles(SPEC, x, [[], [], []])
    assert (delta[:, :, 4] < 0).all() and not delta[:, :, :4].any() and not delta[:, :, 5:].any()


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_a_typed_label_smoothing_goes_before_the_cfgs(eps):
    x, truths = random_case(SPEC)
    spec = replace(SPEC, label_smooth_eps=0.1)
    head = head_of(x, spec, INPUT_HW, torch.float64)
    criterion = DarknetLoss(replace(DARKNET, label_smoothing=eps))
    criterion([head], targets_of(truths, INPUT_HW, torch.float64)).total.backward()
    expected, _ = yolo_layer(x, truths, spec, INPUT_HW, label_smooth_eps=eps)
    np.testing.assert_allclose(-head.logits.grad.permute(0, 1, 4, 2, 3).numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("raw", [60.0, 87.0, 89.0, 150.0])
@pytest.mark.parametrize("sides", [(2,), (3,), (2, 3)])
@pytest.mark.parametrize("iou_loss", ["giou", "ciou"])
def test_a_box_too_large_for_float32_costs_what_it_would_in_float64(iou_loss, sides, raw):
    """e^89 is infinite in float32, and its area before that; the gradient of such a box is none or clipped."""
    spec = replace(SPEC, iou_loss=iou_loss, max_delta=5.0)
    x, truths = random_case(spec)
    x[:, :, sides] = raw
    _, parts = yolo_layer(x, truths, spec, INPUT_HW)
    head = head_of(x, spec, INPUT_HW, torch.float32)
    terms = DarknetLoss(DARKNET)([head], targets_of(truths, INPUT_HW, torch.float32))
    terms.total.backward()
    assert terms.box.item() == pytest.approx(parts["box"], rel=1e-4)
    assert head.logits.grad.isfinite().all()


# --- what is a derivative, and what is not -------------------------------------------------------------------------


def overlapping_pairs(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and sides of boxes that overlap, in float64."""
    truths = torch.cat((torch.rand(count, 2) * 0.4 + 0.3, torch.rand(count, 2) * 0.3 + 0.2), dim=1).double()
    boxes = truths + (torch.rand(count, 4).double() - 0.5) * 0.15
    return boxes, truths


def corners(boxes: torch.Tensor) -> torch.Tensor:
    centre, size = boxes.split(2, dim=1)
    return torch.cat((centre - size / 2, centre + size / 2), dim=1)


@pytest.mark.parametrize(("kind", "overlap"), [("iou", box_iou), ("giou", generalized_box_iou)])
def test_the_ascent_is_the_derivative_but_twice_for_the_sides(kind, overlap):
    boxes, truths = overlapping_pairs()
    boxes.requires_grad_()
    overlap(corners(boxes), corners(truths)).diagonal().sum().backward()
    expected = boxes.grad * torch.tensor([1, 1, 2, 2])
    torch.testing.assert_close(iou_grad(boxes.detach(), truths, kind), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", IOU_THRESH_KINDS)
def test_a_box_without_sides_is_taken_for_one_as_large_as_the_image(kind):
    truth = (0.5, 0.4, 0.3, 0.2)
    for box in ((0.4, 0.4, 0.0, 0.0), (0.4, 0.4, 0.1, 0.0), (0.4, 0.4, 0.0, 0.1)):
        made = iou_grad(torch.tensor([box]).double(), torch.tensor([truth]).double(), kind)[0].tolist()
        assert made == pytest.approx(box_ascent(box, truth, kind), rel=1e-6)
        assert any(made)


def test_the_distance_term_is_its_derivative_but_for_the_sign_of_the_enclosing_box():
    boxes, truths = overlapping_pairs()
    extra = iou_grad(boxes, truths, "diou") - iou_grad(boxes, truths, "iou")
    boxes.requires_grad_()
    gt = corners(truths)
    made = corners(boxes)
    outside = torch.maximum(made[:, 2:], gt[:, 2:]) - torch.minimum(made[:, :2], gt[:, :2])
    distance, diagonal = (boxes - truths)[:, :2].square().sum(1), outside.square().sum(1)
    (by_distance,) = torch.autograd.grad((-distance / diagonal.detach()).sum(), boxes, retain_graph=True)
    (by_diagonal,) = torch.autograd.grad((-distance.detach() / diagonal).sum(), boxes)
    assert by_diagonal[:, :2].abs().max() > 1e-3
    expected = by_distance + by_diagonal * torch.tensor([-1, -1, 1, 1])
    torch.testing.assert_close(extra, expected, rtol=1e-6, atol=1e-6)


def test_objectness_and_class_deltas_are_the_gradient_of_cross_entropy():
    x, truths = random_case(SPEC)
    targets = targets_of([truths[0][:2], truths[1][:1], []], INPUT_HW, torch.float64)
    spec = replace(SPEC, ignore_thresh=0.9)
    gradients = []
    for loss in ("darknet", "autograd"):
        head = head_of(x, spec, INPUT_HW, torch.float64)
        make_criterion(LossOptions(loss=loss))([head], targets).total.backward()
        gradients.append(head.logits.grad[..., 4:])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().max() > 0.1


# --- as a criterion ------------------------------------------------------------------------------------------------


def test_the_criteria_are_the_choices_of_the_flag():
    choices = LossOptions.__dataclass_fields__["loss"].metadata["choices"]
    assert tuple(CRITERIA) == choices
    assert isinstance(make_criterion(LossOptions()), YoloLoss)
    assert isinstance(make_criterion(DARKNET), DarknetLoss)


def test_the_gain_of_the_other_loss_is_refused():
    with pytest.raises(UserError, match="--box-gain is read by --loss autograd, not by --loss darknet"):
        make_criterion(LossOptions(loss="darknet", box_gain=1.0))


def loss_of(logits: torch.Tensor, targets: Targets, spec: YoloSpec = SPEC) -> LossTerms:
    head = RawHead(logits=logits, spec=spec, stride_px=(INPUT_HW[0] / GRID[0], INPUT_HW[1] / GRID[1]))
    return DarknetLoss(DARKNET)([head], targets)


def some_targets(dtype: torch.dtype = torch.float64) -> Targets:
    return targets_of(random_case(SPEC)[1], INPUT_HW, dtype)


@pytest.mark.parametrize("options", ["plain", "smooth", "covering", "everything"])
def test_the_gradient_of_a_batch_does_not_depend_on_the_cut(options):
    spec = replace(SPEC, **OPTIONS[options])
    x, truths = random_case(spec)
    targets = targets_of(truths, INPUT_HW, torch.float64)
    logits = head_of(x, spec, INPUT_HW, torch.float64).logits.detach()
    whole = logits.clone().requires_grad_()
    loss_of(whole, targets, spec).total.backward()
    for image in range(3):
        part = logits[image : image + 1].clone().requires_grad_()
        loss_of(part, targets.of_images(image, image + 1), spec).total.backward()
        torch.testing.assert_close(part.grad, whole.grad[image : image + 1], rtol=0, atol=1e-12)


def test_each_terms_gradient_is_its_own_entries():
    logits = torch.randn(3, 2, *GRID, 8, dtype=torch.float64, requires_grad=True)
    terms = loss_of(logits, some_targets())
    delta, _ = head_deltas(
        RawHead(logits=logits, spec=SPEC, stride_px=(16.0, 8.0)), some_targets(), label_smooth_eps=0.0
    )
    for term, own in ((terms.box, slice(0, 4)), (terms.objectness, slice(4, 5)), (terms.classes, slice(5, None))):
        (gradient,) = torch.autograd.grad(3 * term, logits, retain_graph=True)
        expected = torch.zeros_like(delta)
        expected[..., own] = -3 * delta[..., own]
        assert expected.any()
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_heads_add_their_deltas_and_share_the_cost():
    """darknet prints the mean over its [yolo] layers."""
    logits = [torch.randn(3, 2, *GRID, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    specs = [SPEC, replace(SPEC, mask=(1, 2))]
    heads = [RawHead(logits=x, spec=s, stride_px=(16.0, 8.0)) for x, s in zip(logits, specs, strict=True)]
    targets = some_targets()
    both = DarknetLoss(DARKNET)(heads, targets)
    both.total.backward()
    alone = []
    for x, head in zip(logits, heads, strict=True):
        made, x.grad = x.grad, None
        alone.append(DarknetLoss(DARKNET)([head], targets))
        alone[-1].total.backward()
        assert torch.equal(made, x.grad)
    torch.testing.assert_close(both.detached(), sum(terms.detached() for terms in alone) / 2)


def test_a_crowd_is_nobodys_and_what_lies_in_it_is_spared():
    logits = torch.zeros(1, 2, *GRID, 8, dtype=torch.float64)  # every box is its anchor, every class 0.5
    everywhere = Targets(
        boxes=torch.tensor([[-100.0, -100, 200, 200]], dtype=torch.float64),
        labels=torch.tensor([1]),
        image_index=torch.tensor([0]),
        is_crowd=torch.tensor([True]),
    )
    for spec in (SPEC, replace(SPEC, truth_thresh=0.1)):
        logits.requires_grad_().grad = None
        terms = loss_of(logits, everywhere, spec)
        terms.total.backward()
        assert not logits.grad.any() and terms.total == 0
    unsure = torch.full_like(logits, -5.0).detach().requires_grad_()
    loss_of(unsure, everywhere).total.backward()
    assert (unsure.grad[..., 4] > 0).all() and unsure.grad[..., 4].unique().numel() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_seen_in_single_precision(dtype):
    logits = torch.randn(3, 2, *GRID, 8).to(dtype).requires_grad_()
    targets = some_targets(torch.float32)
    terms = loss_of(logits, targets)
    terms.total.backward()
    assert terms.total.dtype == torch.float32 and logits.grad.dtype == dtype
    exact = logits.detach().float().requires_grad_()
    loss_of(exact, targets).total.backward()
    assert torch.equal(logits.grad, exact.grad.to(dtype))


def test_a_loss_scale_that_float16_cannot_hold_makes_no_nans():
    logits = torch.randn(3, 2, *GRID, 8, dtype=torch.float16).requires_grad_()
    (2.0**16 * loss_of(logits, some_targets(torch.float32)).total).backward()
    exact = logits.detach().float().requires_grad_()
    loss_of(exact, some_targets(torch.float32)).total.backward()
    assert torch.equal(logits.grad, (2.0**16 * exact.grad).half())


@pytest.mark.parametrize("wild", [100.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("iou_loss", [kind for kind in IOU_LOSSES if kind != "mse"])
def test_wild_logits_give_finite_deltas(iou_loss, new_coords, wild):
    spec = replace(SPEC, iou_loss=iou_loss, new_coords=new_coords)
    targets = some_targets(torch.float32)
    for columns in ([2], [3], [2, 3], [0, 1, 2, 3, 4], [5]):
        logits = torch.zeros(3, 2, *GRID, 8)
        logits[..., columns] = wild
        logits.requires_grad_()
        loss_of(logits, targets, spec).total.backward()
        assert torch.isfinite(logits.grad).all() and logits.grad[..., 4:].any()


def test_the_box_cost_is_the_mean_over_the_assignments():
    x, truths = random_case(SPEC)
    targets = targets_of(truths, INPUT_HW, torch.float64)
    head = head_of(x, SPEC, INPUT_HW, torch.float64)
    pairs = assign(targets, SPEC, GRID, head.stride_px)
    assert len(pairs) > 5
    twice = replace(SPEC, iou_normalizer=2 * SPEC.iou_normalizer)
    once, doubled = (DarknetLoss(DARKNET)([replace(head, spec=spec)], targets).box for spec in (SPEC, twice))
    assert 0 < once < SPEC.iou_normalizer
    torch.testing.assert_close(doubled, 2 * once)
