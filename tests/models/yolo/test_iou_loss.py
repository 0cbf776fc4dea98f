"""Losses of box pairs against torchvision's, which select by booleans where ours do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torchvision.ops import box_iou, complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from cfg.yolo import IOU_LOSSES
from models.yolo.iou_loss import iou_loss

KINDS = [kind for kind in IOU_LOSSES if kind != "mse"]
TORCHVISION: dict[str, Callable[..., Tensor]] = {
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}


def pairs(count: int = 400) -> tuple[Tensor, Tensor]:
    """Of all relations: apart, overlapping along one axis or both, one inside the other, the same."""
    random = torch.Generator().manual_seed(0)
    corners = torch.rand(2, count, 2, generator=random, dtype=torch.float64) * 30
    sides = 0.1 + torch.rand(2, count, 2, generator=random, dtype=torch.float64) * 30
    boxes, targets = torch.cat((corners, corners + sides), dim=-1).unbind(0)
    targets[0] = boxes[0]
    inside = torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2]) > 0
    assert {tuple(each) for each in inside.tolist()} == {(a, b) for a in (False, True) for b in (False, True)}
    return boxes, targets


@pytest.mark.parametrize("kind", TORCHVISION)
def test_values_and_gradients_are_torchvisions(kind: str) -> None:
    boxes, targets = pairs()
    made, expected = boxes.clone().requires_grad_(), boxes.clone().requires_grad_()
    ours, theirs = iou_loss(made, targets, kind), TORCHVISION[kind](expected, targets, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.rand(len(boxes), dtype=torch.float64)
    for loss in (ours, theirs):
        (loss * weights).sum().backward()
    torch.testing.assert_close(made.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_plain_iou_is_one_minus_iou() -> None:
    boxes, targets = pairs()
    torch.testing.assert_close(
        iou_loss(boxes, targets, "iou"), 1 - box_iou(boxes, targets).diagonal(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ciou"])  # ciou's weight is held
def test_gradcheck(kind: str) -> None:
    boxes, targets = (each[1:20] for each in pairs())
    assert torch.autograd.gradcheck(lambda each: iou_loss(each, targets, kind), boxes.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_that_only_touch_have_no_overlap_and_a_finite_gradient(kind: str) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]], requires_grad=True)
    loss = iou_loss(boxes, torch.tensor([[10.0, 0, 20, 10], [10, 10, 20, 20]]), kind)
    assert (loss >= 1).all()
    loss.sum().backward()
    assert torch.isfinite(boxes.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_loss_nor_its_gradient_synchronizes(kind: str) -> None:
    """Which a GPU would have to be waited for. `prod`'s gradient does."""
    boxes, targets = pairs()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        iou_loss(boxes.requires_grad_(), targets, kind).sum().backward()
    called = {event.key for event in profiled.key_averages()}
    assert "aten::atan" in called or kind != "ciou"
    assert not called & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_pairs(kind: str) -> None:
    assert iou_loss(torch.zeros(0, 4), torch.zeros(0, 4), kind).shape == (0,)
