"""One training of the study: paired by seed, and blind to the test split until it is over."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import data.dataset
import evaluation.evaluator
import study.presets as presets
import train
from study.cell import job_of_cell, run_cell
from study.grid import Cell
from study.memory import memory_of_batch
from study.presets import PRESETS, preset_source
from study.splits import open_splits

MORE = {"device": "cpu", "workers": 0}
SOURCE = partial(preset_source, bccd=None)
HERE: dict[str, Any] = {"source_of": SOURCE, "more": MORE, "commit": "abc"}
CELL: Cell = replace(PRESETS["smoke"].main_cells(())[0], steps=3, mini_batch=16, mosaic=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(autouse=True)
def in_scratch(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "MADE", made)
    for plot in ("plot_pr_curves", "plot_confusion"):  # they take longer than the training
        monkeypatch.setattr(evaluation.evaluator, plot, lambda *_: None)


def test_norms_and_mini_batches_of_a_seed_see_the_same_images(tmp_path: Path) -> None:
    """first_batch hashes the first batch as it was drawn, augmentation included."""
    hashes = []
    for number, (recipe, mini_batch, seed) in enumerate([("bn", 16, 1), ("cmbn", 4, 1), ("gn", 16, 1), ("bn", 16, 2)]):
        cell = replace(CELL, recipe=recipe, mini_batch=mini_batch, seed=seed, role="tune", steps=1)
        hashes.append(run_cell(cell, tmp_path / str(number), **HERE)["first_batch"])
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


@pytest.mark.parametrize("role", ["main", "tune"])
def test_test_images_never_enter_training_or_selection(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[bool, list[str]] = {True: [], False: []}  # by whether the training was still going on
    training = True
    read_image, train_it = data.dataset.read_image, train.train

    def watched_read(path: str, **settings: Any) -> Any:
        read[training].append(Path(path).parent.name)
        return read_image(path, **settings)

    def watched_train(*args: Any, **kwargs: Any) -> Any:
        nonlocal training
        train_it(*args, **kwargs)
        assert (tmp_path / "run" / "best.pt").is_file()
        training = False

    monkeypatch.setattr(data.dataset, "read_image", watched_read)
    monkeypatch.setattr(train, "train", watched_train)
    row = run_cell(replace(CELL, role=role), tmp_path / "run", **HERE)
    assert not (tmp_path / "run" / "metrics.json").exists(), "nobody looks at a cell's report"
    assert set(read[True]) == {"train", "val"}
    assert set(read[False]) == ({"test"} if role == "main" else set())
    assert (row["test_AP"] is None) == (role == "tune")


def test_a_loss_that_explodes_scores_nothing(tmp_path: Path) -> None:
    row = run_cell(replace(CELL, rate=1e30, mosaic=False), tmp_path / "run", **HERE)
    assert row["diverged"] and row["test_AP"] == row["val_AP"] == 0


def memory_of(recipe: str, **settings: Any) -> float:
    cell = replace(CELL, recipe=recipe, mini_batch=1, mosaic=False)
    source = SOURCE(cell)
    source = replace(source, settings={**source.settings, **settings})
    return memory_of_batch(job_of_cell(cell, source, open_splits(source.path), MORE), step=cell.steps - 1)["memory_MB"]


def test_memory_is_that_of_the_network_that_trains(tmp_path: Path, root: Path) -> None:
    """Memory is that of the norms that its cfg names, and without what it does not store."""
    cfg = (root / "study" / "small.cfg").read_text()
    (tmp_path / "cmbn.cfg").write_text(cfg.replace("batch_normalize=1", "batch_normalize=1\nnorm=cmbn"))
    bn, cmbn = memory_of("bn"), memory_of("cmbn")
    assert bn < memory_of("bn", cfg=str(tmp_path / "cmbn.cfg")) == cmbn
    assert memory_of("bn", checkpoint_activations=True) < bn


def test_memory_is_that_after_the_burn_in_and_of_whole_batches() -> None:
    """In copies of the convolutions' weights: two for cmbn, three with carry, one per mini-batch of cbn's window."""
    bn, cmbn = memory_of("bn"), memory_of("cmbn")
    carried, burnt = (memory_of(f"cmbn:carry,burn_in_steps={steps}") for steps in (0, 1))
    windows = [memory_of(f"cbn:window={window},burn_in_steps=1") for window in (4, 8, 0)]
    assert bn < cmbn < carried == burnt < windows[1] < windows[2]
    copies = pytest.approx(windows[2] - windows[1], rel=0.02)
    assert 2 * (windows[1] - windows[0]) == copies  # windows of 4, 8 and 16
