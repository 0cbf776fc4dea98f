"""darknet's AP against detection by detection, and what is special about it, one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.image_set import ImageSet
from evaluation.darknet_map import POINTS, average_precision, evaluate_darknet, matched_objects, measure_as_darknet
from models.yolo.postprocess import DetectionOptions
from tests.evaluation.fakes import NOTHING, PerfectDetector, known_images
from tests.reference import darknet_map as oracle
from utils.errors import UserError
from utils.structures import Detections

NAMES = ("a", "b", "c", "nowhere")
Image = tuple[Detections, Tensor, Tensor]


def found(boxes: list, scores: list, labels: list) -> Detections:
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


def random_images(count: int = 12) -> list[Image]:
    """Detections near objects, in several copies and often of the wrong class; nothing is there in image 0, and
    nothing is found in image 1."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(count):
        objects, hits = rng.integers(1, 6) * (number != 0), rng.integers(1, 5) * (number != 1)
        centre, half = rng.uniform(20, 80, (objects, 2)), rng.uniform(5, 20, (objects, 2))
        boxes = np.concatenate([centre - half, centre + half], axis=1)
        labels = rng.integers(0, 3, objects)
        near = np.repeat(boxes, hits, axis=0) + rng.normal(0, 3, (objects * hits, 4))
        stray = np.sort(rng.uniform(0, 100, (hits, 2, 2)), axis=1).reshape(-1, 4)
        said = np.where(rng.random(objects * hits) < 0.8, np.repeat(labels, hits), rng.integers(0, 3, objects * hits))
        detections = found(
            [*near.tolist(), *stray.tolist()],
            rng.random(objects * hits + hits).tolist(),
            [*said.tolist(), *rng.integers(0, 3, hits).tolist()],
        )
        truth = found(boxes.tolist(), [0.0] * objects, labels.tolist())
        images.append((detections, truth.boxes, truth.labels))
    return images


def as_lists(image: Image) -> tuple[list[oracle.Found], list[oracle.Truth]]:
    detections, boxes, labels = image
    rows = zip(detections.scores.tolist(), detections.labels.tolist(), detections.boxes.tolist(), strict=True)
    return list(rows), list(zip(labels.tolist(), boxes.tolist(), strict=True))


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("iou", [0.1, 0.5, 0.75])
def test_the_table_is_the_oracles(iou, points):
    images = random_images()
    table = evaluate_darknet(images, NAMES, iou=iou, points=points)
    expected = oracle.average_precisions([as_lists(p) for p in images], 4, limit=iou, points=points)
    assert [row.AP for row in table.classes] == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[0] < 1 and expected[3] == 0
    assert table.mAP == pytest.approx(sum(expected) / 4)
    assert sum(row.objects for row in table.classes) == sum(len(labels) for _, _, labels in images)
    assert sum(row.detections for row in table.classes) == sum(len(detections) for detections, _, _ in images)


@pytest.mark.parametrize("points", POINTS)
def test_the_order_of_images_and_detections_does_not_matter(points):
    images = random_images()
    shuffled = [(d.where(torch.randperm(len(d))), boxes, labels) for d, boxes, labels in reversed(images)]
    one, other = (evaluate_darknet(each, NAMES, iou=0.5, points=points) for each in (images, shuffled))
    assert [row.AP for row in one.classes] == pytest.approx([row.AP for row in other.classes], abs=1e-12)


@pytest.mark.parametrize("points", POINTS)
def test_nothing_there_and_nothing_found(points):
    there = torch.tensor([[0.0, 0, 10, 10]])
    nothing, one = found([], [], []), found([[0, 0, 10, 10]], [0.9], [0])
    none = torch.zeros(0, dtype=torch.int64)
    for detections, boxes, labels, expected in (
        (nothing, there[:0], none, 0.0),
        (nothing, there, torch.tensor([0]), 0.0),
        (one, there[:0], none, 0.0),
        (one, there, torch.tensor([0]), 1.0),
    ):
        table = evaluate_darknet([(detections, boxes, labels)], ("a",), iou=0.5, points=points)
        assert table.mAP == table.classes[0].AP == expected


@pytest.mark.parametrize("points", POINTS)
def test_a_class_without_objects_counts_as_0(points):
    image = (found([[0, 0, 10, 10]], [0.9], [0]), torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]))
    assert evaluate_darknet([image], ("a", "b"), iou=0.5, points=points).mAP == 0.5


def test_a_detection_claims_only_what_it_covers_best():
    """Both cover the left truth best: the second is wrong, though it covers the right one well enough, too."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10]])
    both = found([[0, 0, 10, 10], [0.5, 0, 10.5, 10]], [0.9, 0.8], [0, 0])
    assert matched_objects(both, boxes, torch.tensor([0, 0]), iou=0.5).tolist() == [0, 0]
    table = evaluate_darknet([(both, boxes, torch.tensor([0, 0]))], ("a",), iou=0.5, points=0)
    assert table.mAP == 0.5


def test_the_iou_must_be_exceeded_in_the_same_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    labels = torch.tensor([0, 1])
    detections = found([[0, 0, 10, 5], [0, 0, 10, 5.1], [0, 0, 10, 5], [20, 0, 30, 5]], [0.9] * 4, [0, 0, 1, 1])
    assert matched_objects(detections, boxes, labels, iou=0.5).tolist() == [-1, 0, 1, -1]


def test_the_area_is_under_the_best_precision_to_come():
    scores = np.linspace(0.9, 0.1, 4)
    assert average_precision(scores[:3], np.array([0, -1, 1]), 2, points=0) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert average_precision(scores, np.array([0, 1, -1, 2]), 4, points=0) == pytest.approx(2 / 4 + 1 / 4 * 3 / 4)
    assert average_precision(scores, np.array([-1, 0, 0, 1]), 2, points=0) == pytest.approx(1 / 2)


def test_points_are_reached_exactly():
    """Three of ten objects, first of all: a recall of 3/10 reaches the fourth of 11 points."""
    ap = average_precision(np.array([0.9, 0.8, 0.7, 0.1]), np.array([0, 1, 2, -1]), 10, points=11)
    assert ap == pytest.approx(4 / 11)


def test_the_summary_is_a_table():
    table = evaluate_darknet(random_images(), NAMES, iou=0.5, points=0)
    head, *rows, last = table.summary().splitlines()
    assert head.split() == ["class", "objects", "detections", "AP"]
    assert [row.split()[0] for row in rows] == ["a", "b", "c"]
    assert rows[0].split()[1:] == [
        str(table.classes[0].objects),
        str(table.classes[0].detections),
        f"{100 * table.classes[0].AP:.1f}",
    ]
    assert last == f"mAP@0.50 = {100 * table.mAP:.1f}, area under the curve, mean of 4 classes"
    assert "11 recall points" in evaluate_darknet(random_images(), NAMES, iou=0.5, points=11).summary()


# --- a detector on an image set ------------------------------------------------------------------------------


@pytest.fixture
def known(tmp_path: Path) -> ImageSet:
    return known_images(tmp_path / "images")


class HalfBlind(PerfectDetector):
    """Sees no more than the first object of an image, and the bird."""

    def objects(self, image_id: int) -> Detections:
        detections = super().objects(image_id)
        return detections.where(torch.tensor([0, len(detections) - 1])) if len(detections) > 1 else NOTHING


def test_a_detector_is_measured_with_darknets_thresholds(known: ImageSet):
    """Six dogs, of which three are found; three cats, of which none is; three birds that are not there."""
    detector = HalfBlind(options=DetectionOptions(confidence=0.5, nms_iou=0.9, max_detections=1))
    table = measure_as_darknet(detector, known, iou=0.5, points=0, batch_size=3, workers=0)
    assert [(row.name, row.objects, row.detections, row.AP) for row in table.classes] == [
        ("cat", 3, 0, 0),
        ("bird", 0, 3, 0),
        ("dog", 6, 3, 0.5),
    ]
    darknets = DetectionOptions(confidence=0.005, nms_iou=0.45, max_detections=None)
    assert detector.asked == [((40.0, 30.0), darknets)] * 4  # units: fractions of the image's sides


def test_classes_must_fit(known: ImageSet):
    stranger = PerfectDetector(class_names=("cat", "cow"))
    with pytest.raises(UserError, match="not trained on: dog"):
        measure_as_darknet(stranger, known, iou=0.5, points=0, batch_size=2, workers=0)
