"""The benchmark's own loop is right, and its table has a row for each that takes part."""

from __future__ import annotations

import torch

from benchmarks import nms as benchmark
from tests.reference import nms as oracle

CPU = torch.device("cpu")


def test_the_loop_is_the_oracle() -> None:
    boxes, scores, labels = benchmark.crowd(60, 1, CPU)
    rows = oracle.best_of_image(
        boxes.tolist(), scores[:, None].tolist(), confidence=-1, nms_iou=benchmark.IOU, max_detections=None
    )
    assert scores[benchmark.loop(boxes, scores, labels)].tolist() == [score for score, _, _ in rows]
    assert 1 < len(rows) < 60


def test_every_contestant_gets_a_row(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(benchmark, "AT_LEAST_S", 0)
    monkeypatch.setattr(benchmark, "MAX_LOOP", 50)
    small, large = (benchmark.measure(count, 3, 2, CPU) for count in (50, 51))
    names = ["batched_nms", "default", "greedynms", "diounms", "Python loop"]
    assert [row["nms"] for row in small] == names
    assert [row["nms"] for row in large] == names[:4]
    assert small[0]["time_ratio"] == 1
    assert all(row["ms"] > 0 and row["kept"] > 0 for row in (*small, *large))
    lines = benchmark.table([*small, *large]).splitlines()
    assert lines[1].split() == ["nms", "50", "of", "3", "51", "of", "3"]
    assert lines[-2].split()[-1] == "-"
