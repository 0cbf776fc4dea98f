"""The benchmark of the loader: memory stays flat, and every contestant makes its mosaics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader as benchmark
from tests.data.sets import noise_image_set


@pytest.mark.parametrize("cache", ["off", "ram"])
def test_memory_stays_flat_over_epochs(tmp_path: Path, cache: str) -> None:
    """After the first epoch, in which workers and the cache fill; `--memory` measures it at COCO's size."""
    image_set = benchmark.synthetic_set(tmp_path, 600)
    rows = benchmark.memory_by_epoch(image_set, epochs=4, workers=2, cache=cache)
    for name in ("all_mib", "workers_mib"):
        held = [row[name] for row in rows]
        assert min(held) > 5
        assert max(held[1:]) < 1.02 * held[1]


def test_an_index_of_many_entries_is_small(tmp_path: Path) -> None:
    image_set = benchmark.synthetic_set(tmp_path, 5000)
    arrays = (image_set.paths, image_set.ids, image_set.hws, image_set.boxes, image_set.labels, image_set.starts)
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in arrays)
    assert len(image_set) == 5000
    assert len(set(image_set.paths.tolist())) > 16


@pytest.mark.parametrize("workers", [0, 1])
def test_every_contestant_gets_a_row(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "BATCH", 2)
    image_set = noise_image_set(tmp_path / "set", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = benchmark.measure(image_set, size=64, workers=workers, rounds=2, batches=1)
    assert [row["loader"] for row in rows] == list(benchmark.NAMES)
    assert rows[0]["ratio"] == 1
    assert all(row["samples_per_s"] > 0 for row in rows)
    assert "baseline" in benchmark.table(rows)


def test_the_baseline_makes_mosaics_with_objects(tmp_path: Path) -> None:
    np.random.seed(0)
    image, objects = benchmark.Baseline(noise_image_set(tmp_path, 6), 64)[2]
    assert image.shape == (3, 64, 64)
    assert objects.shape[1] == 5
    assert len(objects) > 0
    assert (objects[:, :4] >= 0).all() and (objects[:, :4] <= 64).all()
