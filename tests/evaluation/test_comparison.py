"""What is said of two detectors on the same images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.image_set import ImageSet
from evaluation.bootstrap import Difference
from evaluation.coco_map import CocoTable, evaluate_coco
from evaluation.comparison import Comparison, measure_detections, p_text
from evaluation.evaluator import Evaluator
from evaluation.matches import match_coco
from tests.evaluation.fakes import PerfectDetector, known_images
from tests.evaluation.test_coco_map import images
from tests.reference.coco_rows import results_from
from utils.errors import UserError


def table(seed: int, *, kept: float = 1.0) -> CocoTable:
    """Return the table of 60 images with a share of the detections, chosen by the seed."""
    truth, rows = images(60, 3)
    is_kept = np.random.default_rng(seed).random(len(rows)) < kept
    results = results_from([row for row, keep in zip(rows, is_kept, strict=True) if keep])
    return evaluate_coco(truth, results).with_matches(match_coco(truth, results, range(60)))


def test_a_file_does_not_differ_from_itself() -> None:
    found = Comparison.of(table(0), table(0))
    for each in (found.difference, *found.classes.values()):
        assert (each.value, each.interval, each.p) == (0, (0, 0), 1)
    assert found.sentence() == "no difference shown between A and B: +0.0 [0.0, 0.0], p = 1"


def test_a_clearly_worse_one_is_found_and_the_order_flips_the_sign() -> None:
    good, bad = table(0), table(1, kept=0.5)
    found, turned = Comparison.of(bad, good), Comparison.of(good, bad)
    assert found.difference.is_shown and found.difference.value > 0
    for name, own in {"": found.difference, **found.classes}.items():
        other = {"": turned.difference, **turned.classes}[name]
        assert other.value == pytest.approx(-own.value, abs=1e-12)
        assert other.interval == pytest.approx((-own.interval[1], -own.interval[0]), abs=1e-12)
        assert other.p == own.p
    assert found.sentence().startswith("B is better than A by ")
    assert turned.sentence() == found.sentence().replace("B is better than A", "A is better than B")


def test_chance_is_not_taken_for_a_difference() -> None:
    found = Comparison.of(table(1, kept=0.9), table(2, kept=0.9))
    assert not found.difference.is_shown
    assert found.sentence().startswith("no difference shown between A and B: ")


def test_the_numbers_are_those_of_the_tables() -> None:
    one, other = table(0), table(1, kept=0.7)
    found = Comparison.of(one, other)
    assert found.difference.value == other.AP - one.AP
    for row, theirs in zip(one.classes, other.classes, strict=True):
        assert found.classes[row.name].value == theirs.AP - row.AP
    content = json.loads(json.dumps(found.to_json()))
    assert (content["A"]["AP"], content["B"]["AP"]) == (one.AP, other.AP)
    assert content["difference"]["value"] == found.difference.value
    assert content["draws"] == 1000
    lines = found.text().splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["class", "class", "class", "class", "all"]
    assert len({len(line) for line in lines[:5]}) == 1


@pytest.mark.parametrize(
    ("value", "interval", "p", "sentence"),
    [
        (0.018, (0.004, 0.031), 0.012, "B is better than A by 1.8 AP [0.4, 3.1], p = .01"),
        (-0.018, (-0.031, -0.004), 0.002, "A is better than B by 1.8 AP [0.4, 3.1], p < .01"),
        (0.003, (-0.009, 0.014), 0.6, "no difference shown between A and B: +0.3 [-0.9, 1.4], p = .60"),
    ],
)
def test_the_sentence(value: float, interval: tuple[float, float], p: float, sentence: str) -> None:
    found = Difference(value=value, interval=interval, p=p)
    assert Comparison(tables=(table(0), table(0)), difference=found, classes={}, draws=1).sentence() == sentence


def test_p_in_words() -> None:
    assert [p_text(p) for p in (1, 0.5, 0.049, 0.0099)] == ["p = 1", "p = .50", "p = .05", "p < .01"]


@pytest.fixture
def known(tmp_path: Path) -> ImageSet:
    return known_images(tmp_path / "images")


def test_what_an_evaluation_wrote_is_measured_again(known: ImageSet, tmp_path: Path) -> None:
    expected = Evaluator(PerfectDetector(), known, batch_size=2, workers=0).report(tmp_path / "run")
    found = measure_detections(tmp_path / "run", known, backend="auto")
    assert (found.stats, found.interval, found.thresholds) == (expected.stats, expected.interval, expected.thresholds)


def test_what_was_found_on_a_coco_file_with_masks_is_measured_again_with_fewer_classes(
    known: ImageSet, tmp_path: Path
) -> None:
    truth = known.ground_truth()
    rows = [{**row, "segmentation": [[1, 1, 9, 1, 9, 9]], "ignore": 0} for row in truth["annotations"]]
    del rows[0]["area"], rows[0]["iscrowd"]
    elsewhere = {**rows[1], "id": 99, "image_id": 99}
    images = [*truth["images"], {"id": 99, "file_name": "gone.png", "height": 60, "width": 80}]
    (tmp_path / "coco.json").write_text(json.dumps({**truth, "images": images, "annotations": [*rows, elsewhere]}))
    coco = replace(known, coco_json=str(tmp_path / "coco.json"))
    expected = Evaluator(PerfectDetector(), coco, batch_size=2, workers=0).report(tmp_path / "run")
    assert measure_detections(tmp_path / "run", coco, backend="auto").stats == expected.stats
    assert measure_detections(tmp_path / "run", coco.of_classes(["cat"]), backend="auto").classes[0].name == "cat"
    one = replace(known, boxes=known.boxes + 1)
    with pytest.raises(UserError, match="was not found on known val"):
        measure_detections(tmp_path / "run", one, backend="auto")


def test_on_a_single_image_nothing_is_shown() -> None:
    truth, rows = images(1, 1, seed=3)
    good, bad = (
        evaluate_coco(truth, results).with_matches(match_coco(truth, results, [0]))
        for results in (results_from(rows), results_from([]))
    )
    assert good.AP > bad.AP == 0
    found = Comparison.of(bad, good)
    assert found.difference.p == 1 and found.sentence().startswith("no difference shown")
    assert good.interval is None and good.classes[0].interval is None
    assert "95 % interval" not in good.text()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("detections.json", None, "cannot be read, No such file or directory"),
        ("detections.json", "{", "is no list of COCO results"),
        ("detections.json", "3", "is no list of COCO results"),
        ("detections.json", "{}", "is no list of COCO results"),
        ("detections.json", '[{"image_id": 5}]', "is no list of COCO results"),
        (
            "detections.json",
            '[{"image_id": 5, "category_id": 3, "bbox": [1, 1, 2, 2, 1, 1, 2, 2], "score": 0.5}]',
            "is no list of COCO results",
        ),
        (
            "detections.json",
            '[{"image_id": 5, "category_id": 3, "bbox": [1, 1, 2, 2], "score": NaN}]',
            "is no list of COCO results",
        ),
        ("ground_truth.json", "[]", "is no list of COCO results"),
        (
            "detections.json",
            '[{"image_id": 99, "category_id": 3, "bbox": [1, 1, 2, 2], "score": 0.5}]',
            "was not found on known val",
        ),
        ("ground_truth.json", '{"annotations": []}', "was not found on known val"),
    ],
)
def test_detections_that_are_missing_damaged_or_of_other_images(
    known: ImageSet, tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    (tmp_path / "detections.json").write_text("[]")
    (tmp_path / name).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"detections.json: {said}"):
        measure_detections(tmp_path, known, backend="auto")


def test_an_interval_of_AP_stays_within_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.coco_map.interval", lambda *_: (-0.01, 1.01))
    found = table(0)
    assert {found.interval, *(row.interval for row in found.classes)} == {(0.0, 1.0)}
    assert "-0.0" not in found.text()
