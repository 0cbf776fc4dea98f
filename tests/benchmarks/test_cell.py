"""One training of the study: paired with its like, and blind to the test split until it is over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.small_batch.sources as sources
import data.dataset
import evaluation.evaluator
import train
from benchmarks.small_batch.cell import check_apart, job_of_cell, memory, run_cell
from benchmarks.small_batch.grid import BUDGETS, Cell
from data.digits import make_digits
from data.source import open_image_set
from engine import build, trainer
from utils.errors import UserError

HERE = {"folders": {}, "device": "cpu", "workers": 0, "commit": "abc"}
CELL: Cell = replace(BUDGETS["smoke"].main_cells(())[0], steps=3, mini_batch=16, mosaic=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(autouse=True)
def in_scratch(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MADE", made)
    for plot in ("plot_pr_curves", "plot_confusion"):  # they take longer than the training
        monkeypatch.setattr(evaluation.evaluator, plot, lambda *_: None)


class Watched:
    """What a training starts from and sees: bytes of the initial weights, and of each batch with its paths."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: bytes = b""
        self.batches: list[tuple[tuple[str, ...], bytes, bytes]] = []
        make_loader, make_clock = build.make_train_loader, trainer.BatchClock
        monkeypatch.setattr(build, "make_train_loader", lambda *a, **k: self._watch(make_loader(*a, **k)))
        monkeypatch.setattr(trainer, "BatchClock", lambda network: make_clock(self._look(network)))

    def _look(self, network: torch.nn.Module) -> torch.nn.Module:
        convs = [m.weight.detach().flatten() for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        self.weights = torch.cat(convs).numpy().tobytes()
        return network

    def _watch(self, loader: Any) -> Any:
        watched = self

        class Loader(type(loader)):  # type: ignore[misc]
            def __iter__(self) -> Iterator[Any]:
                for batch in super().__iter__():
                    seen = (batch.images.numpy().tobytes(), batch.targets.boxes.numpy().tobytes())
                    watched.batches.append((batch.paths, *seen))
                    yield batch

        loader.__class__ = Loader
        return loader


def test_norms_and_mini_batches_see_the_same_images_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, hashes = [], set()
    for number, (recipe, mini_batch, seed) in enumerate(
        [("bn", 16, 1), ("cmbn-weights", 4, 1), ("gn", 16, 1), ("bn", 16, 2)]
    ):
        with monkeypatch.context() as patch:
            watched = Watched(patch)
            cell = replace(CELL, recipe=recipe, mini_batch=mini_batch, seed=seed, role="tune")
            row = run_cell(cell, tmp_path / str(number), **HERE)
        seen.append((watched.weights, watched.batches))
        hashes.add(row["first_batch"])
    one, *alike, other = seen
    assert len(one[1]) == CELL.steps
    assert all(each == one for each in alike)
    assert other[0] != one[0] and all(a != b for a, b in zip(other[1], one[1], strict=True))
    assert len(hashes) == 2, "the hash in the rows tells pairs from others"


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

    def watched_train(*given: Any, **named: Any) -> Any:
        nonlocal training
        train_it(*given, **named)
        assert (tmp_path / "run" / "best.pt").is_file()
        training = False

    monkeypatch.setattr(data.dataset, "read_image", watched_read)
    monkeypatch.setattr(train, "train", watched_train)
    row = run_cell(replace(CELL, role=role), tmp_path / "run", **HERE)
    assert not (tmp_path / "run" / "metrics.json").exists(), "nobody looks at a cell's report"
    assert set(read[True]) == {"train", "val"}
    assert set(read[False]) == ({"test", "val"} if role == "main" else {"val"})
    assert (row["test_AP"] is None) == (role == "tune")


def test_a_test_split_that_shares_images_is_refused() -> None:
    source = sources.prepare(CELL, {})
    train_set, val_set = (open_image_set(source.path, split) for split in ("train", "val"))
    check_apart(train_set, val_set, open_image_set(source.path, str(source.test)))
    with pytest.raises(UserError, match="shares 8 images with 'val'"):
        check_apart(train_set, val_set, val_set)


def test_a_loss_that_explodes_scores_nothing(tmp_path: Path) -> None:
    row = run_cell(replace(CELL, rate=1e30, mosaic=False), tmp_path / "run", **HERE)
    assert row["diverged"] and row["test_AP"] == row["val_AP"] == 0


def test_what_is_not_made_here_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--bccd"):
        run_cell(replace(CELL, data="bccd", scenes=0), tmp_path / "run", **HERE)


def test_digits_fit_the_smallest_scene(tmp_path: Path) -> None:
    """At 80 px the largest digit is as tall as it can be with room to lie in."""
    folder = make_digits(tmp_path / "digits", counts={"train": 64}, hw=(80, 80), shift=1.0)
    boxes = json.loads((folder / "annotations" / "instances_train.json").read_text())["annotations"]
    assert max(box["bbox"][3] for box in boxes) <= 64


def test_memory_is_that_after_the_burn_in_and_of_whole_batches() -> None:
    """In copies of the convolutions' weights: cmbn two, one more with carry; cbn's window of as many as a batch."""

    def memory_of(recipe: str) -> float:
        cell = replace(CELL, recipe=recipe, mini_batch=1, mosaic=False)
        job = job_of_cell(cell, sources.prepare(cell, {}), device="cpu", workers=0)
        return memory(cell, job.options, job.plan)["memory_MB"]

    bn, cmbn, carried, burnt = map(memory_of, ("bn", "cmbn-weights", "cmbn-carry", "cmbn-carry+burn"))
    windows = [memory_of(f"cbn-std-weights{window}") for window in ("", "-w8", "-wbatch")]
    assert bn < cmbn < carried == burnt < windows[1] < windows[2]
    copies = pytest.approx(windows[2] - windows[1], rel=0.02)
    assert 2 * (windows[1] - windows[0]) == copies  # windows of 4, 8 and 16
