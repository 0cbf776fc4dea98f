"""From a detector to COCO numbers and files, with a detector that knows the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.evaluator import Evaluator, category_of_label, collect_results, detections_of, write_report
from utils import ranks
from utils.errors import UserError
from utils.structures import Batch, Detections, Placement, Targets

CPU = torch.device("cpu")
NAMES, IDS = ("dog", "cat"), (17, 3)  # the data set's; by label 0, 1
MODEL_NAMES = ("cat", "bird", "dog")
PLACEMENT = Placement(source_hw=(60, 80), scale_x=0.5, scale_y=0.5, left_px=0.0, top_px=5.0)  # into 40 x 40


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
    with pytest.raises(UserError, match=r"not trained on: zebra \(the network knows a, b\); .*--names FILE"):
        category_of_label(("a", "b"), data, range(len(data)))


def truth() -> dict:
    """Four images of 60 x 80; the last one holds nothing."""
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in (5, 6, 7):
        for number in range(3):
            x, y, w, h = (*rng.uniform(0, 20, 2), *rng.uniform(8, 35, 2))
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": IDS[number % 2],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    for number, row in enumerate(annotations, start=1):
        row["id"] = number
    return {
        "images": [{"id": i, "width": 80, "height": 60} for i in (5, 6, 7, 8)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)],
    }


def batches() -> list[Batch]:
    """Two of two images; an image's first pixel is its id."""
    nothing = Targets(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.long),
        image_index=torch.zeros(0, dtype=torch.long),
        is_crowd=torch.zeros(0, dtype=torch.bool),
    )
    made = []
    for ids in ((5, 6), (7, 8)):
        images = torch.tensor(ids, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 40, 40).clone()
        made.append(Batch(images=images, targets=nothing, image_ids=ids, paths=("", ""), placements=(PLACEMENT,) * 2))
    return made


Units = Sequence[tuple[float, float]]


def perfect(images: torch.Tensor, units_px: Units) -> list[Detections]:
    """What is there, in input pixels, by the model's labels; and a bird, which the data set does not know."""
    found = []
    for image in images:
        image_id = round(image[0, 0, 0].item() * 255)
        rows = [row for row in truth()["annotations"] if row["image_id"] == image_id]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)]
        boxes = PLACEMENT.to_input(np.array([*corners, [0, 0, 80, 60]], np.float32))
        labels = [{3: 0, 17: 2}[row["category_id"]] for row in rows] + [1]
        found.append(
            Detections(
                boxes=torch.from_numpy(boxes).float(),
                scores=torch.linspace(0.9, 0.6, len(labels)),
                labels=torch.tensor(labels),
            )
        )
    return found


CATEGORIES = category_of_label(MODEL_NAMES, NAMES, IDS)
FIELDS = ("boxes", "scores", "labels")


def test_perfect_detections_become_the_truth_in_source_pixels():
    rows = collect_results(perfect, batches(), CATEGORIES, device=CPU).rows()
    expected = truth()["annotations"]
    assert [(row["image_id"], row["category_id"]) for row in rows] == [
        (row["image_id"], row["category_id"]) for row in expected
    ]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["bbox"] == pytest.approx(wanted["bbox"], abs=2e-3)


@pytest.mark.parametrize("save_ground_truth", [False, True])
def test_a_perfect_detector_scores_one_and_leaves_its_files(tmp_path: Path, save_ground_truth):
    results = collect_results(perfect, batches(), CATEGORIES, device=CPU)
    folder = tmp_path / "new" / "folder"
    table = write_report(folder, truth(), results, image_ids=[5, 6, 7, 8], save_ground_truth=save_ground_truth)
    assert pytest.approx(1.0) == table.AP == table.AP50
    files = {"detections.json", "metrics.json", "metrics.txt", "pr_curves.png", "confusion.png"}
    files |= {"ground_truth.json"} if save_ground_truth else set()
    assert {path.name for path in folder.iterdir()} == files
    assert json.loads((folder / "detections.json").read_text()) == results.rows()
    assert json.loads((folder / "metrics.json").read_text())["AP"] == pytest.approx(1.0)


def test_missing_objects_cost_recall():
    def lazy(images: torch.Tensor, units_px: Units) -> list[Detections]:
        return [found.where(torch.arange(len(found)) == 0) for found in perfect(images, units_px)]

    assert len(collect_results(lazy, batches(), CATEGORIES, device=CPU)) == 3


def test_the_best_are_taken_of_those_the_data_set_knows():
    """Not of all, where birds push the objects out."""

    def bird_watcher(images: torch.Tensor, units_px: Units) -> list[Detections]:
        birds = Detections(boxes=torch.rand(5, 4), scores=torch.linspace(1, 0.95, 5), labels=torch.ones(5).long())
        return [
            Detections(**{name: torch.cat([getattr(birds, name), getattr(found, name)]) for name in FIELDS})
            for found in perfect(images, units_px)
        ]

    best, all_known = (
        collect_results(bird_watcher, batches(), CATEGORIES, device=CPU, max_detections=most) for most in (2, None)
    )
    assert len(all_known) == 9
    assert best.rows() == [row for number, row in enumerate(all_known.rows()) if number % 3 < 2]


def evaluator() -> Evaluator:
    return Evaluator(
        detect=perfect,
        batches=batches(),
        class_names=MODEL_NAMES,
        ground_truth=truth(),
        image_ids=[5, 6, 7, 8],
        categories=CATEGORIES,
        device=CPU,
        is_coco=False,
        max_detections=100,
    )


def whole_rows() -> list[dict]:
    return collect_results(perfect, batches(), CATEGORIES, device=CPU).rows()


def test_the_examiner_measures_and_reports(tmp_path: Path):
    assert pytest.approx(1.0) == evaluator().measure().AP
    assert pytest.approx(1.0) == evaluator().report(tmp_path).AP
    assert {"predictions.png", "ground_truth.json", "detections.json"} <= {path.name for path in tmp_path.iterdir()}


def test_ranks_measure_what_one_rank_measures(monkeypatch: pytest.MonkeyPatch):
    """Each with every second image, by turns, as two ranks have them; the second one has more."""
    whole = evaluator()
    of_image = [
        Batch(
            images=each.images[i : i + 1],
            targets=each.targets,
            image_ids=each.image_ids[i : i + 1],
            paths=("",),
            placements=(PLACEMENT,),
        )
        for each in whole.batches
        for i in range(2)
    ]
    shares = [replace(whole, batches=of_image[:1]), replace(whole, batches=of_image[:0:-1])]
    parts = [share.results() for share in shares]
    assert [len(part) for part in parts] == [3, 6]
    monkeypatch.setattr(ranks, "all_gather", lambda value: parts)
    assert shares[0].results().rows() == shares[1].results().rows() == whole_rows()
    assert shares[1].measure().stats() == whole.measure().stats()


def test_only_the_first_rank_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    table = evaluator().measure()
    monkeypatch.setattr(ranks, "is_rank_zero", lambda: False)
    monkeypatch.setattr(ranks, "broadcast", lambda value: table if value is None else value)
    assert evaluator().report(tmp_path) is table
    assert list(tmp_path.iterdir()) == []


def test_finding_nothing_is_a_score_of_zero(tmp_path: Path):
    def blind(images: torch.Tensor, units_px: Units) -> list[Detections]:
        return [found.where(found.scores > 1) for found in perfect(images, units_px)]

    results = collect_results(blind, batches(), CATEGORIES, device=CPU)
    assert len(results) == 0
    assert write_report(tmp_path, truth(), results, image_ids=[5, 6, 7, 8], save_ground_truth=False).AP == 0


@pytest.mark.parametrize(("relative", "unit"), [(False, (0.5, 0.5)), (True, (40.0, 30.0))])
def test_distances_are_measured_in_source_pixels_or_in_images(relative, unit):
    asked = []

    def asking(images: torch.Tensor, units_px: Units) -> list[Detections]:
        asked.extend(units_px)
        return perfect(images, units_px)

    pairs = list(detections_of(asking, batches(), device=CPU, relative=relative))
    assert asked == [unit] * 4
    assert [batch.image_ids for batch, _ in pairs] == [(5, 6), (7, 8)]
    assert [len(found) for _, both in pairs for found in both] == [4, 4, 4, 1]


def test_a_mosaic_cannot_be_evaluated():
    (first, _) = batches()
    mosaic = Batch(
        images=first.images, targets=first.targets, image_ids=(5, 6), paths=("", ""), placements=(None, None)
    )
    with pytest.raises(AssertionError, match="whole images"):
        collect_results(perfect, [mosaic], CATEGORIES, device=CPU)
