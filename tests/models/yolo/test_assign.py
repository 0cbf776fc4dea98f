"""assign and best_overlap against the slow oracle, on random objects; and the rule's edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cfg.yolo import IOU_THRESH_KINDS, YoloSpec
from models.yolo.assign import Assignment, assign, best_overlap, best_target, shape_overlap
from tests.reference import assignment as oracle
from tests.reference.darknet_loss import SHAPE_OVERLAPS
from utils.structures import Targets

ANCHORS = ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0), (30.0, 61.0), (62.0, 45.0), (59.0, 119.0))
INPUT_HW, STRIDE = (96, 128), (16.0, 8.0)
GRID = (6, 16)


def targets_of(boxes, *, labels=None, image_index=None, is_crowd=None) -> Targets:
    count = len(boxes)
    return Targets(
        boxes=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * count, dtype=torch.long),
        image_index=torch.tensor(image_index or [0] * count, dtype=torch.long),
        is_crowd=torch.tensor(is_crowd or [False] * count),
    )


def random_targets(count: int, images: int = 4, crowds: float = 0.2) -> Targets:
    centre = torch.rand(count, 2, dtype=torch.float64) * torch.tensor([INPUT_HW[1], INPUT_HW[0]])
    size = torch.exp(torch.empty(count, 2, dtype=torch.float64).uniform_(0.5, 5.0))
    return Targets(
        boxes=torch.cat((centre - size / 2, centre + size / 2), dim=1),
        labels=torch.randint(0, 3, (count,)),
        image_index=torch.randint(0, images, (count,)),
        is_crowd=torch.rand(count) < crowds,
    )


def as_lists(targets: Targets):
    return [tuple(box) for box in targets.boxes.tolist()], targets.image_index.tolist(), targets.is_crowd.tolist()


def pairs_of(assignment: Assignment) -> list[tuple[int, ...]]:
    columns = (*assignment.index, assignment.target)
    return list(zip(*(c.tolist() for c in columns), strict=True))


@pytest.mark.parametrize("iou_thresh", [1.0, 0.213, 0.5, 0.0])
@pytest.mark.parametrize("mask", [(0, 1, 2), (3, 4, 5), (4, 1), (2,)])
@pytest.mark.parametrize("count", [0, 1, 60])
def test_the_assignment_is_the_oracles(count, mask, iou_thresh):
    spec = YoloSpec(anchors=ANCHORS, mask=mask, iou_thresh=iou_thresh)
    targets = random_targets(count)
    made = pairs_of(assign(targets, spec, GRID, STRIDE))
    expected = oracle.assign(
        *as_lists(targets), anchors=ANCHORS, mask=mask, iou_thresh=iou_thresh, grid_hw=GRID, stride_px=STRIDE
    )
    assert len(made) == len(set(made))
    assert set(made) == expected


@pytest.mark.parametrize("kind", IOU_THRESH_KINDS)
def test_shape_overlaps_are_the_oracles(kind):
    sizes, anchors = torch.rand(30, 2, dtype=torch.float64) + 0.01, torch.rand(7, 2, dtype=torch.float64) + 0.01
    made = shape_overlap(sizes, anchors, kind)
    for size, row in zip(sizes.tolist(), made.tolist(), strict=True):
        expected = [SHAPE_OVERLAPS[kind]((0, 0, *anchor), (0, 0, *size)) for anchor in anchors.tolist()]
        assert row == pytest.approx(expected, abs=1e-12)


def test_another_kind_of_overlap_chooses_other_anchors():
    targets = random_targets(60)
    spec = YoloSpec(anchors=ANCHORS, mask=(0, 1, 2), iou_thresh=0.2)
    kinds = [replace(spec, iou_thresh_kind=kind) for kind in ("iou", "giou")]
    by_iou, by_giou = (set(pairs_of(assign(targets, kind, GRID, STRIDE))) for kind in kinds)
    assert by_giou < by_iou  # GIoU is less wherever neither shape contains the other


def test_each_object_is_some_heads_best():
    targets = random_targets(80, crowds=0)
    heads = [YoloSpec(anchors=ANCHORS, mask=mask) for mask in ((0, 1, 2), (3, 4, 5))]
    answered = [assign(targets, spec, GRID, STRIDE).target for spec in heads]
    assert torch.cat(answered).sort().values.tolist() == list(range(80))


def test_the_first_of_equal_anchors_wins():
    twice = ((10.0, 10.0), (20.0, 20.0), (20.0, 20.0))
    targets = targets_of([[30, 30, 50, 50]])
    assert len(assign(targets, YoloSpec(anchors=twice, mask=(2,)), GRID, STRIDE)) == 0
    assert pairs_of(assign(targets, YoloSpec(anchors=twice, mask=(2, 1)), GRID, STRIDE)) == [(0, 1, 2, 5, 0)]


def test_the_best_anchor_may_be_another_heads_and_further_ones_are_positive_too():
    targets = targets_of([[20, 20, 53, 43]])  # exactly anchor 2
    assert pairs_of(assign(targets, YoloSpec(anchors=ANCHORS, mask=(2, 0)), GRID, STRIDE)) == [(0, 0, 1, 4, 0)]
    assert len(assign(targets, YoloSpec(anchors=ANCHORS, mask=(3, 4, 5)), GRID, STRIDE)) == 0
    generous = YoloSpec(anchors=ANCHORS, mask=(3, 4, 5), iou_thresh=0.27)
    assert {pair[1] for pair in pairs_of(assign(targets, generous, GRID, STRIDE))} == {0, 1}  # 0.31 and 0.272


def test_a_crowd_is_nobodys():
    spec = YoloSpec(anchors=ANCHORS, mask=(0, 1, 2, 3, 4, 5), iou_thresh=0.0)
    boxes = [[10, 10, 40, 40], [12, 12, 42, 42]]
    made = assign(targets_of(boxes, is_crowd=[True, False]), spec, GRID, STRIDE)
    assert set(made.target.tolist()) == {1}
    assert len(assign(targets_of(boxes, is_crowd=[True, True]), spec, GRID, STRIDE)) == 0


@pytest.mark.parametrize(
    ("centre", "cell"),  # x, y -> row, column
    [((128, 96), (5, 15)), ((128, 0), (0, 15)), ((0, 96), (5, 0)), ((8, 16), (1, 1)), ((7.99, 15.99), (0, 0))],
)
def test_a_centre_on_the_edge_goes_to_the_last_cell(centre, cell):
    x, y = centre
    spec = YoloSpec(anchors=ANCHORS, mask=(0,))
    made = assign(targets_of([[x - 5, y - 6.5, x + 5, y + 6.5]]), spec, GRID, STRIDE)
    assert (made.row.item(), made.column.item()) == cell


def test_pairs_are_index_tensors_also_when_there_are_none():
    made = assign(random_targets(0), YoloSpec(anchors=ANCHORS, mask=(0, 1)), GRID, STRIDE)
    assert {(t.dtype, t.shape) for t in (*made.index, made.target)} == {(torch.int64, (0,))}


# --- best_overlap --------------------------------------------------------------------------------------------


def random_predictions(images: int) -> torch.Tensor:
    centre = torch.rand(images, 2, 3, 4, 2, dtype=torch.float64) * torch.tensor([INPUT_HW[1], INPUT_HW[0]])
    size = torch.exp(torch.empty(images, 2, 3, 4, 2, dtype=torch.float64).uniform_(0.5, 5.0))
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


@pytest.mark.parametrize("crowds", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_best_overlap_is_the_oracles(count, crowds):
    boxes, targets = random_predictions(5), random_targets(count, images=4, crowds=crowds)  # the last image is empty
    made = best_overlap(boxes, targets)
    assert made.shape == boxes.shape[:-1]
    for image in range(5):
        expected = [
            oracle.best_overlap(tuple(box), image, *as_lists(targets)) for box in boxes[image].reshape(-1, 4).tolist()
        ]
        assert made[image].flatten().tolist() == pytest.approx(expected, abs=1e-12)
    assert not made[4].any()


def test_a_prediction_within_a_crowd_is_wholly_covered_however_small():
    boxes = torch.tensor([[20.0, 20, 24, 24], [90, 40, 110, 60]]).view(1, 1, 1, 2, 4)
    region = [0, 0, 100, 90]
    assert best_overlap(boxes, targets_of([region], is_crowd=[True])).flatten().tolist() == [1, 0.5]
    as_object = best_overlap(boxes, targets_of([region])).flatten().tolist()
    assert as_object == pytest.approx([16 / 9000, 200 / 9200])


def test_best_overlap_of_a_box_without_area_is_zero():
    boxes = torch.tensor([30.0, 30, 30, 30]).view(1, 1, 1, 1, 4)
    for crowd in (False, True):
        assert best_overlap(boxes, targets_of([[0, 0, 60, 60]], is_crowd=[crowd])).item() == 0


# --- best_target ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crowds", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_best_object_is_the_oracles_and_no_crowd(count, crowds):
    boxes, targets = random_predictions(5), random_targets(count, images=4, crowds=crowds)
    overlap, index = best_target(boxes, targets)
    corners, images, is_crowd = as_lists(targets)
    for image in range(5):
        own = [i for i in range(count) if images[i] == image and not is_crowd[i]]
        for box, iou, best in zip(
            boxes[image].reshape(-1, 4).tolist(),
            overlap[image].flatten().tolist(),
            index[image].flatten().tolist(),
            strict=True,
        ):
            each = {i: oracle.best_overlap(tuple(box), 0, [corners[i]], [0], [False]) for i in own}
            assert iou == pytest.approx(max(each.values(), default=0), abs=1e-12)
            assert iou == 0 or best == max(own, key=each.get)


def test_the_first_of_equal_objects_is_the_best():
    equal_boxes = targets_of([[0, 0, 9, 9], [10, 10, 30, 30], [10, 10, 30, 30]])
    overlap, index = best_target(torch.tensor([[12.0, 10, 30, 30]]).view(1, 1, 1, 1, 4).double(), equal_boxes)
    assert (overlap.item(), index.item()) == (pytest.approx(0.9), 1)
