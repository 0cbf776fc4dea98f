"""From a detector to COCO numbers and files, with a detector that knows the answers."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from data.image_set import ImageSet
from evaluation.evaluator import Evaluator, category_of_label
from models.detector import Detector
from models.yolo.postprocess import DetectionOptions
from tests.evaluation.fakes import IDS, MODEL_NAMES, NAMES, NOTHING, PerfectDetector, known_images
from utils import ranks
from utils.errors import UserError
from utils.stop import Stop, Stopped
from utils.structures import Detections

FIELDS = ("boxes", "scores", "labels")


@pytest.mark.parametrize(
    ("model", "data", "ids", "expected"),
    [
        (("a", "b"), ("a", "b"), (1, 2), {0: 1, 1: 2}),
        (("a", "b"), ("b", "a"), (1, 2), {0: 2, 1: 1}),
        (MODEL_NAMES, NAMES, IDS, {0: 3, 2: 17}),
        (("a", "b"), ("b",), (90,), {1: 90}),
    ],
)
def test_categories_are_matched_by_name(model, data, ids, expected):
    assert category_of_label(model, data, ids) == expected


@pytest.mark.parametrize("data", [("a", "zebra"), ("zebra",)])
def test_a_class_the_network_cannot_know_is_the_users_error(data):
    with pytest.raises(UserError, match=r"not trained on: zebra \(the network knows a, b\): .*--names FILE"):
        category_of_label(("a", "b"), data, range(len(data)))


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return known_images(tmp_path / "images")


def evaluator_of(detector: Detector, images: ImageSet, stop: Stop | None = None) -> Evaluator:
    return Evaluator(detector, images, batch_size=2, workers=0, stop=stop)


def test_perfect_detections_become_the_ground_truth_in_source_pixels(images: ImageSet):
    rows = evaluator_of(PerfectDetector(), images).detect().rows()
    expected = images.ground_truth()["annotations"]
    keys = ("image_id", "category_id")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in expected]
    for row, target in zip(rows, expected, strict=True):
        assert row["bbox"] == pytest.approx(target["bbox"], abs=2e-3)


def test_a_perfect_detector_scores_one_and_leaves_its_files(images: ImageSet, tmp_path: Path):
    evaluator = evaluator_of(PerfectDetector(), images)
    folder = tmp_path / "new" / "folder"
    table = evaluator.report(folder)
    assert pytest.approx(1.0) == table.AP == table.AP50
    files = {"detections.json", "metrics.json", "metrics.txt", "pr_curves.png", "confusion.png", "ground_truth.json"}
    assert {path.name for path in folder.iterdir()} == {*files, "predictions.png"}
    assert json.loads((folder / "detections.json").read_text()) == evaluator.detect().rows()
    assert json.loads((folder / "metrics.json").read_text())["AP"] == pytest.approx(1.0)


def test_missing_objects_cost_recall(images: ImageSet):
    class Lazy(PerfectDetector):
        def objects(self, image_id: int) -> Detections:
            found = super().objects(image_id)
            return found.where(torch.arange(len(found)) == 0)

    assert len(evaluator_of(Lazy(), images).detect()) == 3


def test_the_best_are_taken_of_those_the_data_set_knows(images: ImageSet):
    """Not of all, where birds push the objects out; the detector is asked for all."""

    class BirdWatcher(PerfectDetector):
        def objects(self, image_id: int) -> Detections:
            found = super().objects(image_id)
            birds = Detections(boxes=torch.rand(5, 4), scores=torch.linspace(1, 0.95, 5), labels=torch.ones(5).long())
            return Detections(**{name: torch.cat([getattr(birds, name), getattr(found, name)]) for name in FIELDS})

    two = BirdWatcher(options=DetectionOptions(max_detections=2))
    best, all_known = (evaluator_of(each, images).detect() for each in (two, BirdWatcher()))
    assert len(all_known) == 9
    assert best.rows() == [row for number, row in enumerate(all_known.rows()) if number % 3 < 2]
    assert [options for _, options in two.asked] == [DetectionOptions(max_detections=None)] * 4


def test_finding_nothing_is_a_score_of_zero(images: ImageSet):
    class Blind(PerfectDetector):
        def objects(self, image_id: int) -> Detections:
            return NOTHING

    evaluator = evaluator_of(Blind(), images)
    assert len(evaluator.detect()) == 0
    assert evaluator.measure().AP == 0


def test_ranks_measure_what_one_rank_measures(images: ImageSet, monkeypatch: pytest.MonkeyPatch):
    whole = evaluator_of(PerfectDetector(), images)
    table, rows = whole.measure(), whole.detect().rows()
    shares = []
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(evaluator_of(PerfectDetector(), images))
    monkeypatch.undo()
    parts = [share.detect() for share in shares]
    assert [len(part) for part in parts] == [3, 3, 3]
    monkeypatch.setattr(ranks, "all_gather", lambda value: [[part] for part in parts[::-1]])
    for share in shares:
        assert share.detect().rows() == rows
        assert share.measure().stats == table.stats


def test_only_the_first_rank_writes(images: ImageSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    evaluator = evaluator_of(PerfectDetector(), images)
    table = evaluator.measure()
    monkeypatch.setattr(ranks, "is_rank_zero", lambda: False)
    monkeypatch.setattr(ranks, "broadcast", lambda value: table if value is None else value)
    (tmp_path / "report").mkdir()
    assert evaluator.report(tmp_path / "report") is table
    assert list((tmp_path / "report").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("refused", ["detections.json", "metrics.txt", "pr_curves.png", "predictions.png"])
def test_what_the_disk_refuses_is_not_there_and_all_else_is(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, refused: str
):
    """Refused half-way through."""
    fsync, write_bytes = os.fsync, Path.write_bytes

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"{refused}.part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    def cut(path: Path, content: bytes) -> int:
        write_bytes(path, content[:9] if path.name == refused else content)
        if path.name == refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(content)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "write_bytes", cut)
    folder = tmp_path / "report"
    evaluator_of(PerfectDetector(), images).report(folder)
    files = {"detections.json", "metrics.json", "metrics.txt", "pr_curves.png", "confusion.png", "ground_truth.json"}
    assert {path.name for path in folder.iterdir()} == {*files, "predictions.png"} - {refused}
    assert f"error: {folder / refused} was not written (No space left on device)" in capsys.readouterr().err


def test_a_stop_is_heeded(images: ImageSet):
    stop = Stop()
    evaluator = evaluator_of(PerfectDetector(), images, stop)
    stop.requested = True
    with pytest.raises(Stopped):
        evaluator.measure()
