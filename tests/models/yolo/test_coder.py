"""decode and encode undo each other, and decode is darknet's, written slowly."""

from __future__ import annotations

import math

import pytest
import torch

from cfg.yolo import YoloSpec
from models.yolo.anchor_grid import AnchorGrid, anchor_grid, cell_grid
from models.yolo.coder import decode, decode_head, encode
from models.yolo.head import RawHead

ANCHORS = ((10.0, 13.0), (30.0, 21.0), (58.0, 90.0))
STRIDES = [(8.0, 8.0), (16.0, 32.0), (12.5, 8.0)]  # y, x


def spec_with(**keys) -> YoloSpec:
    return YoloSpec(anchors=ANCHORS, mask=(0, 1, 2), **keys)


def sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t))


def decode_by_hand(raw, cell, anchor, stride_px, spec) -> list[float]:
    """One box, in darknet's words: x = s * sigmoid(tx) - (s - 1) / 2, bx = (column + x) * stride."""
    x, y, w, h = raw
    s = spec.scale_x_y
    centre_x = (cell[0] + s * sigmoid(x) - (s - 1) / 2) * stride_px[1]
    centre_y = (cell[1] + s * sigmoid(y) - (s - 1) / 2) * stride_px[0]
    if spec.new_coords:
        width, height = 4 * sigmoid(w) ** 2 * anchor[0], 4 * sigmoid(h) ** 2 * anchor[1]
    else:
        width, height = math.exp(w) * anchor[0], math.exp(h) * anchor[1]
    return [centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2]


def some(count: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """raw, cells, anchors, in float64."""
    raw = torch.randn(count, 4, dtype=torch.float64) * 1.5
    cells = torch.randint(0, 30, (count, 2)).double()
    anchors = torch.tensor(ANCHORS, dtype=torch.float64)[torch.randint(0, 3, (count,))]
    return raw, cells, anchors


@pytest.mark.parametrize("stride_px", STRIDES)
@pytest.mark.parametrize("scale_x_y", [1.0, 1.05, 1.2, 2.0])
@pytest.mark.parametrize("new_coords", [False, True])
def test_decode_is_the_formula_box_by_box(new_coords, scale_x_y, stride_px):
    spec = spec_with(new_coords=new_coords, scale_x_y=scale_x_y)
    raw, cells, anchors = some()
    boxes = decode(raw, AnchorGrid.of(cells, anchors, stride_px, spec))
    for box, *place in zip(boxes.tolist(), raw.tolist(), cells.tolist(), anchors.tolist(), strict=True):
        assert box == pytest.approx(decode_by_hand(*place, stride_px, spec), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("stride_px", STRIDES)
@pytest.mark.parametrize("scale_x_y", [1.0, 1.05, 1.2, 2.0])
@pytest.mark.parametrize("new_coords", [False, True])
def test_encode_then_decode_is_the_identity(new_coords, scale_x_y, stride_px):
    spec = spec_with(new_coords=new_coords, scale_x_y=scale_x_y)
    _, cells, anchors = some()
    within = torch.rand(200, 2, dtype=torch.float64) * 0.998 + 0.001  # of what the cell can reach
    centre = (cells + scale_x_y * within - (scale_x_y - 1) / 2) * torch.tensor(stride_px[::-1])
    size = anchors * torch.empty(200, 2, dtype=torch.float64).uniform_(0.01, 3.9)
    boxes = torch.cat((centre - size / 2, centre + size / 2), dim=1)
    raw = encode(boxes, AnchorGrid.of(cells, anchors, stride_px, spec))
    torch.testing.assert_close(
        decode(raw, AnchorGrid.of(cells, anchors, stride_px, spec)), boxes, rtol=1e-10, atol=1e-9
    )


@pytest.mark.parametrize("new_coords", [False, True])
def test_decode_then_encode_is_the_identity(new_coords):
    spec = spec_with(new_coords=new_coords, scale_x_y=1.05)
    raw, cells, anchors = some()
    boxes = decode(raw, AnchorGrid.of(cells, anchors, (8.0, 16.0), spec))
    torch.testing.assert_close(
        encode(boxes, AnchorGrid.of(cells, anchors, (8.0, 16.0), spec)), raw, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("new_coords", [False, True])
def test_a_box_out_of_reach_is_encoded_as_the_nearest_one(new_coords):
    spec = spec_with(new_coords=new_coords)
    cells, anchors = torch.tensor([[2.0, 3.0]]), torch.tensor([ANCHORS[0]])
    far = torch.tensor([[16.0 - 5, 24.0 - 50, 16.0 + 5, 24.0 + 50]])  # on the cell's corner; over 4 anchors high
    raw = encode(far, AnchorGrid.of(cells, anchors, (8.0, 8.0), spec))
    assert torch.isfinite(raw).all()
    left, top, right, bottom = decode(raw, AnchorGrid.of(cells, anchors, (8.0, 8.0), spec))[0].tolist()
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((16, 24), abs=1e-3)
    assert right - left == pytest.approx(10, rel=1e-4)
    assert bottom - top == pytest.approx(52 if new_coords else 100, rel=1e-4)


@pytest.mark.parametrize("wild", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("new_coords", [False, True])
def test_a_wild_logit_gives_a_finite_box_and_a_finite_gradient(new_coords, wild):
    raw = torch.full((1, 4), wild, requires_grad=True)
    anchors = torch.tensor([ANCHORS[2]])
    boxes = decode(
        raw, AnchorGrid.of(torch.tensor([[3.0, 4.0]]), anchors, (8.0, 8.0), spec_with(new_coords=new_coords))
    )
    boxes.square().sum().backward()
    assert torch.isfinite(boxes).all() and torch.isfinite(raw.grad).all()


@pytest.mark.parametrize("wild", [-1e4, -100.0, -20.0])
@pytest.mark.parametrize("new_coords", [False, True])
def test_no_box_loses_its_area_to_rounding(new_coords, wild):
    raw = torch.tensor([[0.3, 0.7, wild, wild]])
    far = torch.tensor([[75.0, 75.0]])  # a cell at pixel 600
    box = decode(raw, AnchorGrid.of(far, torch.tensor([ANCHORS[0]]), (8.0, 8.0), spec_with(new_coords=new_coords)))[0]
    assert (box[2:] > box[:2]).all()


def test_the_grid_holds_column_then_row():
    grid = cell_grid(2, 3, torch.zeros(1))
    assert grid.tolist() == [[[0, 0], [1, 0], [2, 0]], [[0, 1], [1, 1], [2, 1]]]


@pytest.mark.parametrize("new_coords", [False, True])
def test_decode_head_agrees_with_decode_at_each_cell(new_coords):
    spec = YoloSpec(anchors=ANCHORS, mask=(2, 0), classes=1, new_coords=new_coords, scale_x_y=1.1)
    head = RawHead(logits=torch.randn(2, 2, 3, 4, 6, dtype=torch.float64), spec=spec, stride_px=(16.0, 8.0))
    boxes = decode_head(head)
    assert boxes.shape == (2, 2, 3, 4, 4)
    for image in range(2):
        for place, anchor in enumerate((2, 0)):
            for row in range(3):
                for column in range(4):
                    raw = head.logits[image, place, row, column, :4].tolist()
                    expected = decode_by_hand(raw, (column, row), ANCHORS[anchor], (16.0, 8.0), spec)
                    assert boxes[image, place, row, column].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("given", "made"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_boxes_have_at_least_single_precision(given, made):
    head = RawHead(logits=torch.zeros(1, 3, 2, 2, 25, dtype=given), spec=spec_with(), stride_px=(8.0, 8.0))
    assert decode_head(head).dtype == made


def test_concatenated_heads_share_one_cached_anchor_grid():
    specs = [spec_with(scale_x_y=1.05), YoloSpec(anchors=ANCHORS, mask=(2, 0), scale_x_y=1.2)]
    heads = [
        RawHead(logits=torch.randn(1, len(spec.mask), *hw, 25, dtype=torch.float64), spec=spec, stride_px=stride)
        for spec, hw, stride in zip(specs, [(2, 3), (4, 6)], [(16.0, 8.0), (8.0, 4.0)], strict=True)
    ]
    grid = anchor_grid(heads, torch.float64)
    assert grid.values.shape == (3 * 6 + 2 * 24, 7)
    raw = torch.cat([head.logits[..., :4].flatten(1, 3) for head in heads], dim=1)
    torch.testing.assert_close(decode(raw, grid), torch.cat([decode_head(head).flatten(1, 3) for head in heads], 1))
    assert anchor_grid(heads, torch.float64) is grid and anchor_grid(heads[:1], torch.float64) is not grid
    assert anchor_grid(heads, torch.float32).values.dtype == torch.float32
