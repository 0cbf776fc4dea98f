"""Arithmetic of boxes against one pair at a time, in plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.reference import nms as oracle
from tests.reference.assignment import area as area_of
from tests.reference.assignment import intersection as intersection_of
from utils.boxes import area, box_iou, elementwise_iou, shape_iou, share_inside


def random_boxes(count: int) -> Tensor:
    corner = torch.rand(count, 2, dtype=torch.float64) * 60
    return torch.cat((corner, corner + 5 + torch.rand(count, 2, dtype=torch.float64) * 40), dim=1)


def test_every_pair_is_the_oracles():
    boxes, others = random_boxes(40), random_boxes(30)
    expected = torch.tensor([[oracle.iou(a, b) for b in others.tolist()] for a in boxes.tolist()]).double()
    torch.testing.assert_close(elementwise_iou(boxes[:, None], others), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(box_iou(boxes, others), elementwise_iou(boxes[:, None], others))
    inside = [[intersection_of(a, b) / area_of(a) for b in others.tolist()] for a in boxes.tolist()]
    torch.testing.assert_close(share_inside(boxes, others), torch.tensor(inside, dtype=torch.float64))


def test_shapes_are_boxes_with_a_common_centre():
    shapes, anchors = torch.rand(20, 2).double() + 0.1, torch.rand(9, 2).double() + 0.1
    centred = [torch.cat((-sides / 2, sides / 2), dim=1) for sides in (shapes, anchors)]
    torch.testing.assert_close(shape_iou(shapes, anchors), box_iou(*centred))


@pytest.mark.parametrize("box", [[5.0, 5, 5, 5], [5.0, 0, 5, 9]])
def test_a_box_without_area_is_inside_nothing(box):
    flat, other = torch.tensor([box]), torch.tensor([[0.0, 0, 9, 9]])
    assert area(flat).item() == elementwise_iou(flat, other).item() == share_inside(flat, other).item() == 0
    assert elementwise_iou(flat, flat).isnan().all()
