"""Suppression against one box after the other; what must hold for any boxes; and the degenerate ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from cfg.yolo import NMS_KINDS
from models.yolo import nms as module
from models.yolo.nms import NmsRule, centre_distance, classwise_nms
from tests.reference import nms as oracle
from utils.boxes import elementwise_iou

DISTANCE_KINDS = ("greedynms", "diounms")


def crowd(count: int, classes: int = 3, spread_px: float = 60) -> tuple[Tensor, Tensor, Tensor]:
    """boxes, scores, labels: boxes of 5 to 45 px that overlap often, no two scores equal."""
    centre = torch.rand(count, 2, dtype=torch.float64) * spread_px
    half = torch.rand(count, 2, dtype=torch.float64) * 20 + 2.5
    scores = (torch.randperm(count) + 1).double() / (count + 1)
    return torch.cat((centre - half, centre + half), dim=1), scores, torch.randint(classes, (count,))


def kept(boxes: Tensor, scores: Tensor, labels: Tensor, kind: str, *, iou: float = 0.45, beta: float = 0.6) -> set[int]:
    found = classwise_nms(boxes, scores, labels, NmsRule(kind=kind, iou=iou, beta=beta)).tolist()
    assert len(found) == len(set(found))
    return set(found)


def always(monkeypatch: pytest.MonkeyPatch, way: str, block: int = 128) -> None:
    monkeypatch.setattr(module, "_fastest", lambda kind, sizes: getattr(module, f"_by_{way}"))
    monkeypatch.setattr(module, "BLOCK", block)


RULES = [("default", 0.6), ("greedynms", 0.6), ("greedynms", 2.0), ("diounms", 0.6), ("diounms", 1.3)]
WAYS = [("pairs", 128), *(("blocks", block) for block in (1, 2, 7, 128))]


@pytest.mark.parametrize(
    ("kind", "beta", "way", "block"),
    [("default", 0.6, "kernel", 128), *((*rule, *way) for rule in RULES for way in WAYS)],
)
def test_kept_boxes_are_the_oracles(kind, beta, way, block, monkeypatch):
    always(monkeypatch, way, block)
    for iou in (0.0, 0.2, 0.45, 0.8):
        boxes, scores, labels = crowd(150)
        unit = tuple(torch.empty(2).uniform_(0.2, 5).tolist())
        rule = NmsRule(kind=kind, iou=iou, beta=beta)
        found = classwise_nms(boxes, scores, labels, rule, unit=unit)
        expected = set()
        for label in range(3):
            of_class = (labels == label).nonzero()[:, 0]
            rows = oracle.best_of_image(
                boxes[of_class].tolist(),
                scores[of_class, None].tolist(),
                confidence=-1.0,
                nms_iou=iou,
                max_detections=None,
                kind=kind,
                beta=beta,
                unit=unit,
            )
            expected |= {score for score, _, _ in rows}
        assert set(scores[found].tolist()) == expected
        assert len(found) == len(expected)
        assert iou > 0.45 or len(found) < 150


@pytest.mark.parametrize("way", ["pairs", "kernel", "blocks"])
def test_of_the_default_kind_each_way_is_torchvisions_to_the_bit(way, monkeypatch):
    """Whole and half pixels: many an IoU is exactly, or but for its rounding, the threshold."""
    always(monkeypatch, way)
    for iou in torch.tensor((0.0, 0.2, 1 / 3, 0.5, 0.6)).tolist():  # in float32, as we compare; the kernel takes double
        boxes, scores, labels = crowd(300, classes=9, spread_px=12)
        boxes = (boxes.float() / 4).round() / 2
        expected = set()
        for label in range(9):
            of_class = (labels == label).nonzero()[:, 0]
            expected |= set(of_class[nms(boxes[of_class], scores[of_class].float(), iou)].tolist())
        assert 9 <= len(expected) < 300
        assert kept(boxes, scores.float(), labels, "default", iou=iou) == expected


@pytest.mark.parametrize("kind", NMS_KINDS)
def test_suppressing_twice_changes_nothing(kind):
    boxes, scores, labels = crowd(400)
    once = sorted(kept(boxes, scores, labels, kind))
    assert 0 < len(once) < 400
    assert kept(boxes[once], scores[once], labels[once], kind) == set(range(len(once)))


@pytest.mark.parametrize("kind", NMS_KINDS)
def test_the_order_of_the_boxes_does_not_matter(kind):
    boxes, scores, labels = crowd(400)
    shuffled = torch.randperm(400)
    found = kept(boxes[shuffled], scores[shuffled], labels[shuffled], kind)
    assert {int(shuffled[index]) for index in found} == kept(boxes, scores, labels, kind)


@pytest.mark.parametrize("kind", NMS_KINDS)
def test_a_class_does_not_see_the_others(kind):
    boxes, scores, labels = crowd(300)
    apart = set()
    for label in range(3):
        of_class = (labels == label).nonzero()[:, 0]
        found = kept(boxes[of_class], scores[of_class], labels[of_class], kind)
        apart |= {int(of_class[index]) for index in found}
    assert kept(boxes, scores, labels, kind) == apart


@pytest.mark.parametrize("kind", NMS_KINDS)
def test_each_dropped_box_has_a_better_one_that_stays(kind):
    """And no two that stay exceed each other's threshold: what greedy means, without an order."""
    boxes, scores, labels = crowd(300)
    stay = kept(boxes, scores, labels, kind)
    for index in range(300):
        stronger = [
            other
            for other in stay
            if labels[other] == labels[index]
            and scores[other] > scores[index]
            and oracle.overlap(boxes[other].tolist(), boxes[index].tolist(), kind) > 0.45
        ]
        assert bool(stronger) == (index not in stay)


@pytest.mark.parametrize("kind", NMS_KINDS)
def test_no_box_and_one_box(kind):
    boxes, scores, labels = crowd(1)
    found = classwise_nms(boxes[:0], scores[:0], labels[:0], NmsRule(kind=kind, iou=0.5))
    assert found.shape == (0,) and found.dtype == torch.int64
    assert kept(boxes, scores, labels, kind) == {0}


@pytest.mark.parametrize("count", [2, 500])
@pytest.mark.parametrize("kind", NMS_KINDS)
def test_of_identical_boxes_the_first_best_stays(kind, count):
    boxes = torch.tensor([[3.0, 4, 30, 50]]).expand(count, 4)
    labels = torch.zeros(count, dtype=torch.int64)
    assert kept(boxes, torch.full((count,), 0.5), labels, kind) == {0}
    assert kept(boxes, torch.arange(count) / count, labels, kind) == {count - 1}
    assert kept(boxes, torch.arange(count) / count, torch.arange(count), kind) == set(range(count))


@pytest.mark.parametrize("kind", NMS_KINDS)
def test_boxes_without_area_overlap_nothing(kind):
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 5, 10, 5], [0, 0, 10, 10]])
    labels = torch.zeros(4, dtype=torch.int64)
    assert kept(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), labels, kind, iou=0.0) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", NMS_KINDS)
@pytest.mark.parametrize("tenths", range(1, 10))
def test_an_overlap_of_exactly_the_threshold_is_no_reason_to_go(kind, tenths):
    """Two boxes with a common centre, one inside the other: their IoU is tenths / 10 but for rounding."""
    boxes = torch.tensor([[-10.0, -5, 10, 5], [-2.0 * tenths / 2, -5, 2.0 * tenths / 2, 5]])
    labels, scores = torch.zeros(2, dtype=torch.int64), torch.tensor([0.9, 0.8])
    assert kept(boxes, scores, labels, kind, iou=tenths / 10) == {0, 1}
    assert kept(boxes, scores, labels, kind, iou=tenths / 10 - 1e-6) == {0}


@pytest.mark.parametrize("kind", DISTANCE_KINDS)
def test_neighbours_with_centres_apart_may_overlap_more(kind):
    boxes = torch.tensor([[0.0, 0, 10, 10], [3, 0, 13, 10]])  # IoU 7/13; d / c = 9 / 269, its 0.6th power 0.13
    labels, scores = torch.zeros(2, dtype=torch.int64), torch.tensor([0.9, 0.8])
    assert kept(boxes, scores, labels, "default") == {0}
    assert kept(boxes, scores, labels, kind) == {0, 1}
    assert kept(boxes, scores, labels, kind, iou=0.4) == {0}


def test_beta_is_for_diounms_only_and_0_6_is_greedynms():
    boxes, scores, labels = crowd(400)
    greedy = kept(boxes, scores, labels, "greedynms", beta=0.6)
    assert greedy == kept(boxes, scores, labels, "greedynms", beta=3.0)
    assert greedy == kept(boxes, scores, labels, "diounms", beta=0.6)
    assert len(kept(boxes, scores, labels, "diounms", beta=3.0)) < len(greedy)


def test_the_unit_of_distances_matters_to_distances_only():
    """Side by side in a wide image: in shares of its sides they are nearer to each other than in pixels."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [3, 0, 13, 10]])
    labels, scores = torch.zeros(2, dtype=torch.int64), torch.tensor([0.9, 0.8])
    for kind, expected in (("default", ({0}, {0})), ("greedynms", ({0, 1}, {0}))):
        rule = NmsRule(kind=kind, iou=0.45)
        for unit, target in zip(((1.0, 1.0), (8.0, 1.0)), expected, strict=True):
            assert set(classwise_nms(boxes, scores, labels, rule, unit=unit).tolist()) == target


@pytest.mark.parametrize("way", ["pairs", "blocks"])
@pytest.mark.parametrize("kind", DISTANCE_KINDS)
def test_a_chain_is_settled_link_by_link(kind, way, monkeypatch):
    """Each box is dropped by the one before it, if that stays: every other one does, over several blocks too."""
    always(monkeypatch, way)
    left = torch.arange(600, dtype=torch.float64) * 2
    boxes = torch.stack((left, torch.zeros(600), left + 10, torch.full((600,), 10.0)), dim=1)
    scores, labels = torch.linspace(1, 0.1, 600).double(), torch.zeros(600, dtype=torch.int64)
    assert kept(boxes, scores, labels, kind, iou=0.5) == set(range(0, 600, 2))


@pytest.mark.parametrize("kind", DISTANCE_KINDS)
def test_no_more_pairs_than_a_block_has_with_all_boxes(kind, monkeypatch):
    pairs = []

    def counting(boxes: Tensor, others: Tensor) -> Tensor:
        pairs.append(len(boxes) * len(others))
        return elementwise_iou(boxes, others)

    monkeypatch.setattr(module, "elementwise_iou", counting)
    boxes, scores, labels = crowd(3000, classes=1, spread_px=4000)
    found = kept(boxes, scores, labels, kind)
    assert len(found) > 2000
    assert max(pairs) <= module.BLOCK * 3000
    assert sum(pairs) < 3000 * 3000


def test_distances_are_the_oracles():
    (boxes, _, _), (others, _, _) = crowd(30), crowd(30)
    distances = centre_distance(boxes, others)
    for row, (box, other) in enumerate(zip(boxes.tolist(), others.tolist(), strict=True)):
        expected = oracle.iou(box, other) - oracle.overlap(box, other, "diounms", beta=1.0)
        assert distances[row].item() == pytest.approx(expected)
