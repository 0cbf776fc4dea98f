"""postprocess against one box after the other; and the empty, the single and the crowded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cfg.yolo import YoloSpec
from models.yolo import postprocess as module
from models.yolo.coder import decode_head, encode
from models.yolo.head import RawHead
from models.yolo.postprocess import DetectionOptions, candidates, suppress
from tests.models.yolo.grids import grid_of
from tests.reference import nms as oracle
from utils.structures import Detections

ANCHORS = ((10.0, 14.0), (22.0, 17.0), (30.0, 40.0))
OPTIONS = DetectionOptions(confidence=0.25, nms_iou=0.45, max_detections=100)


def random_heads(images: int = 3, classes: int = 3) -> list[RawHead]:
    return [
        RawHead(
            logits=torch.randn(images, 2, height, width, 5 + classes) * 1.5,
            spec=YoloSpec(anchors=ANCHORS, mask=mask, classes=classes, scale_x_y=1.05),
            stride_px=(48 / height, 64 / width),
        )
        for mask, height, width in (((0, 1), 6, 4), ((1, 2), 3, 2))
    ]


def head_saying(boxes, scores) -> RawHead:
    """One image, a row of cells of 8 px: box i in cell i, scores[i] a class; objectness is certain."""
    count, classes = len(boxes), len(scores[0])
    spec = YoloSpec(anchors=((16.0, 16.0),), mask=(0,), classes=classes, scale_x_y=200.0)  # reaches everywhere
    cells = torch.stack((torch.arange(count), torch.zeros(count)), dim=1).double()
    anchors = torch.full((count, 2), 16.0, dtype=torch.float64)
    logits = torch.full((1, 1, 1, count, 5 + classes), 40.0, dtype=torch.float64)
    logits[0, 0, 0, :, :4] = encode(torch.tensor(boxes).double(), **grid_of(cells, anchors, (8.0, 8.0), spec))
    logits[0, 0, 0, :, 5:] = torch.tensor(scores).double().clamp(1e-9, 1 - 1e-9).logit()
    return RawHead(logits=logits, spec=spec, stride_px=(8.0, 8.0))


def postprocess(heads: list[RawHead], options: DetectionOptions, units_px=None) -> list[Detections]:
    return suppress(candidates(heads, confidence=options.confidence), heads[-1].spec, options, units_px)


def rows_of(found: Detections) -> list[tuple]:
    return list(zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True))


@pytest.mark.parametrize("max_detections", [3, 1000])
@pytest.mark.parametrize("nms_iou", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("confidence", [0.01, 0.3])
def test_postprocess_is_the_oracle(confidence, nms_iou, max_detections):
    heads = random_heads()
    knobs = {"confidence": confidence, "nms_iou": nms_iou, "max_detections": max_detections}
    made = postprocess(heads, DetectionOptions(**knobs))
    assert len(made) == 3
    for image, found in enumerate(made):
        boxes = [box for head in heads for box in decode_head(head)[image].reshape(-1, 4).tolist()]
        probabilities = [head.logits[image, ..., 4:].sigmoid().reshape(-1, 4) for head in heads]
        scores = [(row[:1] * row[1:]).tolist() for part in probabilities for row in part]
        expected = oracle.best_of_image(boxes, scores, **knobs)
        assert len(expected) > 2
        assert [(label, box) for _, label, box in rows_of(found)] == [
            (label, pytest.approx(box, rel=1e-6)) for _, label, box in expected
        ]
        assert found.scores.tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-6)


@pytest.mark.parametrize("kind", ["greedynms", "diounms"])
def test_postprocess_is_the_oracle_with_distances(kind):
    heads = [replace(head, spec=replace(head.spec, beta_nms=1.7)) for head in random_heads(2)]
    units = [(64.0, 48.0), (0.5, 2.0)]
    made = postprocess(heads, DetectionOptions(confidence=0.01, nms_iou=0.3, max_detections=None, nms=kind), units)
    for image, (found, unit) in enumerate(zip(made, units, strict=True)):
        boxes = [box for head in heads for box in decode_head(head)[image].reshape(-1, 4).tolist()]
        probabilities = [head.logits[image, ..., 4:].sigmoid().reshape(-1, 4) for head in heads]
        scores = [(row[:1] * row[1:]).tolist() for part in probabilities for row in part]
        knobs = {"confidence": 0.01, "nms_iou": 0.3, "max_detections": None, "kind": kind, "beta": 1.7}
        expected = oracle.best_of_image(boxes, scores, **knobs, unit=unit)
        assert found.scores.tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-6)
        assert found.labels.tolist() == [label for _, label, _ in expected]


def test_the_last_yolo_names_the_nms_kind():
    first, last = random_heads()
    knobs = {"confidence": 0.01, "nms_iou": 0.2, "max_detections": None}
    last = replace(last, spec=replace(last.spec, nms_kind="diounms", beta_nms=0.3))
    as_cfg = postprocess([first, last], DetectionOptions(**knobs))
    for found, expected in zip(
        as_cfg, postprocess([first, last], DetectionOptions(**knobs, nms="diounms")), strict=True
    ):
        assert rows_of(found) == rows_of(expected)
    plain = postprocess([first, last], DetectionOptions(**knobs, nms="default"))
    assert sum(map(len, plain)) < sum(map(len, as_cfg))
    unsaid = replace(last, spec=replace(last.spec, nms_kind="default"))
    assert list(map(rows_of, plain)) == list(map(rows_of, postprocess([first, unsaid], DetectionOptions(**knobs))))


def test_candidates_come_cell_by_cell():
    """Of each head the cells row by row, of each cell its anchors, of each anchor its classes."""
    heads = random_heads(1)
    (found,) = candidates(heads, confidence=0.0)
    expected = [
        (label, decode_head(head)[0, anchor, row, column].tolist())
        for head in heads
        for row in range(head.grid_hw[0])
        for column in range(head.grid_hw[1])
        for anchor in range(2)
        for label in range(3)
    ]
    assert list(zip(found.labels.tolist(), found.boxes.tolist(), strict=True)) == expected


def test_best_first():
    for found in postprocess(random_heads(), OPTIONS):
        assert len(found) > 2
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_nothing_found_is_empty_and_of_the_right_shapes():
    heads = random_heads()
    for head in heads:
        head.logits[..., 4] = -50
    for found in postprocess(heads, OPTIONS):
        assert len(found) == 0
        assert found.boxes.shape == (0, 4) and found.scores.shape == (0,)
        assert found.labels.dtype == torch.int64


def test_one_candidate():
    head = head_saying([[3, 4, 20, 30]], [[0.1, 0.8]])
    (found,) = postprocess([head], OPTIONS)
    assert found.labels.tolist() == [1]
    assert found.scores.tolist() == pytest.approx([0.8])
    assert found.boxes.tolist() == [pytest.approx([3, 4, 20, 30])]


def test_the_score_is_objectness_times_class():
    head = head_saying([[3, 4, 20, 30]], [[0.8]])
    head.logits[..., 4] = 0
    (found,) = postprocess([head], OPTIONS)
    assert found.scores.tolist() == pytest.approx([0.4])
    assert len(postprocess([head], replace(OPTIONS, confidence=0.41))[0]) == 0


def test_max_detections_keeps_the_best():
    boxes = [[30 * k, 0, 30 * k + 20, 20] for k in range(5)]
    head = head_saying(boxes, [[0.5], [0.9], [0.6], [0.8], [0.7]])
    (found,) = postprocess([head], replace(OPTIONS, max_detections=2))
    assert found.boxes.round().tolist() == [boxes[1], boxes[3]]
    (every,) = postprocess([head], replace(OPTIONS, max_detections=None))
    assert every.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])


@pytest.mark.parametrize("kind", ["default", "greedynms", "diounms"])
@pytest.mark.parametrize("max_detections", [1, 2, 3, 7])
def test_the_strongest_candidates_are_enough(kind: str, max_detections: int) -> None:
    """Also where scores are equal: the best of all that suppression keeps, whatever it began with."""
    torch.manual_seed(max_detections)
    for _ in range(20):
        heads = random_heads(classes=2)
        for head in heads:
            head.logits[..., 4:] = head.logits[..., 4:].round()  # many are equal
        options = replace(OPTIONS, nms=kind, confidence=0.01)
        every = postprocess(heads, replace(options, max_detections=None))
        for found, whole in zip(
            postprocess(heads, replace(options, max_detections=max_detections)), every, strict=True
        ):
            expected = whole.where(torch.arange(min(max_detections, len(whole))))
            assert torch.equal(found.boxes, expected.boxes) and torch.equal(found.scores, expected.scores)
            assert torch.equal(found.labels, expected.labels)


def test_suppression_is_within_a_class():
    same, other = [10, 10, 50, 50], [11, 10, 51, 50]
    (one,) = postprocess([head_saying([same, other], [[0.9, 0.0], [0.8, 0.0]])], OPTIONS)
    assert one.labels.tolist() == [0] and one.boxes.round().tolist() == [same]
    (two,) = postprocess([head_saying([same, other], [[0.9, 0.0], [0.0, 0.8]])], OPTIONS)
    assert two.labels.tolist() == [0, 1]


def test_suppression_is_within_a_class_also_beyond_the_images_edge():
    """Boxes of negative coordinates: a class must not be moved onto the one before it."""
    boxes = [[-100, -100, 20, 20], [500, 500, 608, 608]]
    (found,) = postprocess([head_saying(boxes, [[0.0, 0.8], [0.9, 0.0]])], OPTIONS)
    assert found.labels.tolist() == [0, 1]


def test_a_huge_box_leaves_the_others_their_shape():
    """The small ones' IoU is 0.43; rounded to eighths of a pixel it would be 0.455, and one of them gone."""
    boxes = [[100, 100, 101, 101], [100.4, 100, 101.4, 101], [-20000, -20000, 20000, 20000]]
    scores = [[0.0] * 80 for _ in boxes]
    scores[0][79], scores[1][79], scores[2][0] = 0.9, 0.8, 0.7
    head = head_saying(boxes, scores)
    (found,) = postprocess([RawHead(logits=head.logits.float(), spec=head.spec, stride_px=(8.0, 8.0))], OPTIONS)
    assert found.labels.tolist() == [79, 79, 0]


def test_a_box_may_be_found_in_two_classes():
    (found,) = postprocess([head_saying([[10, 10, 50, 50]], [[0.6, 0.7]])], OPTIONS)
    assert found.labels.tolist() == [1, 0]


def test_beyond_the_candidates_limit_the_weakest_go(monkeypatch):
    monkeypatch.setattr(module, "MAX_CANDIDATES", 2)
    boxes = [[30 * k, 0, 30 * k + 20, 20] for k in range(4)]
    (found,) = postprocess([head_saying(boxes, [[0.5], [0.9], [0.6], [0.8]])], OPTIONS)
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])


def test_half_precision_logits_are_scored_in_single():
    heads = [RawHead(logits=h.logits.bfloat16(), spec=h.spec, stride_px=h.stride_px) for h in random_heads()]
    for found in postprocess(heads, OPTIONS):
        assert found.boxes.dtype == found.scores.dtype == torch.float32


@pytest.mark.parametrize("confidence", [0.0, 0.001, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_are_those_of_decoding_every_cell(confidence: float, dtype: torch.dtype) -> None:
    heads = [replace(head, logits=head.logits.to(dtype)) for head in random_heads()]
    for image, found in enumerate(candidates(heads, confidence=confidence)):
        boxes, scores = [], []
        for head in heads:
            boxes.append(decode_head(head)[image].permute(1, 2, 0, 3).reshape(-1, 4))
            probabilities = head.logits[image].float().permute(1, 2, 0, 3)[..., 4:].sigmoid().flatten(0, 2)
            scores.append(probabilities[:, :1] * probabilities[:, 1:])
        index, label = (torch.cat(scores) > confidence).nonzero(as_tuple=True)
        assert torch.equal(found.labels, label)
        torch.testing.assert_close(found.scores, torch.cat(scores)[index, label])
        torch.testing.assert_close(found.boxes, torch.cat(boxes)[index])
