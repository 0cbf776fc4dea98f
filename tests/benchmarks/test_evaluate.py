"""The synthetic val2017 is one, and the benchmark says whether numbers are the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import evaluate as benchmark


def test_images_and_detections_are_like_cocos() -> None:
    random = np.random.default_rng(0)
    gt = benchmark.make_ground_truth(400, random)
    rows = gt["annotations"]
    assert 5 < len(rows) / 400 < 9
    assert 0 < sum(row["iscrowd"] for row in rows) < len(rows) / 20
    results = benchmark.make_results(gt, 4001, random)
    assert len(results) == 4001
    assert (np.diff(results.image_ids) >= 0).all()
    same_image = np.diff(results.image_ids) == 0
    assert (np.diff(results.scores)[same_image] <= 0).all()


def test_a_row_of_figures() -> None:
    pytest.importorskip("faster_coco_eval")
    random = np.random.default_rng(1)
    gt = benchmark.make_ground_truth(12, random)
    row = benchmark.measure(gt, benchmark.make_results(gt, 600, random), rounds=2)
    assert (row["images"], row["detections"], row["classes"], len(row["time_ratios"])) == (12, 600, 80, 2)
    assert row["identical"] is True
    assert 0.01 < row["numbers"]["AP"] < 0.9


def test_a_difference_is_found() -> None:
    random = np.random.default_rng(1)
    gt = benchmark.make_ground_truth(6, random)
    table = benchmark.evaluate_coco(gt, benchmark.make_results(gt, 60, random), backend=benchmark.PYCOCOTOOLS)
    assert benchmark.same(table, table)
    assert not benchmark.same(table, replace(table, stats={**table.stats, "AR_M": table.stats["AR_M"] + 1e-11}))
    assert not benchmark.same(table, replace(table, precision=table.precision + 1e-11))
