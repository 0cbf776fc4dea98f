"""A study of a reader's own data, from its command line."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import data.dataset
import evaluation.evaluator
import train
from cfg.plan import load_plan
from engine.step import TrainStep
from study import __main__ as page
from study.__main__ import main, parse
from study.cell import run_cell
from study.grid import Cell
from study.own import own_study
from study.rows import read_rows
from tests.study.folders import roboflow, voc
from utils.errors import UserError
from utils.structures import Batch

# Of 10 images 6 to train on, so a step an epoch.
FLAGS = ["--images-per-forward", "1", "2", "--train", "--max-steps 2 --batch-size 2 --image-size 32 --evals 1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voc(tmp_path_factory.mktemp("data") / "pets", 10)


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for plot in ("plot_pr_curves", "plot_confusion"):  # they take longer than the training
        monkeypatch.setattr(evaluation.evaluator, plot, lambda *_: None)
    yield


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(folder), *FLAGS, "--rates", "default", "--out", str(out), "--jobs", "0", *more]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "step_s", "date")} for row in rows]


def test_a_study_from_command_line_to_advice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trainings, whose images are watched: norms see the same, and test images come last."""
    read: list[tuple[str, str]] = []
    batches: list[list[tuple[tuple[str, ...], float]]] = []
    read_image, train_it, take_step = data.dataset.read_image, train.train, TrainStep.__call__
    stage = "after"

    def watched_read(path: str, **settings: Any) -> Any:
        read.append((stage, os.path.basename(path)))
        return read_image(path, **settings)

    def watched_train(*args: Any, **kwargs: Any) -> None:
        nonlocal stage
        stage = "training"
        batches.append([])
        train_it(*args, **kwargs)
        stage = "after"

    def watched_step(step: TrainStep, batch: Batch) -> Tensor:
        batches[-1].append((tuple(batch.paths), float(batch.images.double().sum())))
        return take_step(step, batch)

    monkeypatch.setattr(data.dataset, "read_image", watched_read)
    monkeypatch.setattr(train, "train", watched_train)
    monkeypatch.setattr(TrainStep, "__call__", watched_step)
    main(command(folder, tmp_path / "out", "--norms", "bn", "cmbn:carry", "--seeds", "1"))
    printed = capsys.readouterr().out
    assert "6 images to train on, 2 images to select by (val), 2 images to test on" in printed
    assert "With 1 image in a forward there are fewer than 3 seeds" in printed
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert [(row["recipe"], row["mini_batch"]) for row in rows] == [
        ("bn", 1),
        ("cmbn:carry", 1),
        ("bn", 2),
        ("cmbn:carry", 2),
    ]
    assert len(batches[0]) == 2 and batches == 4 * [batches[0]]
    seen, tested = ({name for at, name in read if at == stage} for stage in ("training", "after"))
    assert len(seen) == 8 and len(tested) == 2 and not seen & tested
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rows.jsonl", "table.md", "table.json", "plot.png"}
    assert str(folder.parent) not in (tmp_path / "out" / "rows.jsonl").read_text()

    main(command(folder, tmp_path / "out", "--norms", "bn", "cmbn:carry", "--seeds", "1", "--report-only"))
    again = capsys.readouterr().out
    assert "[1/" not in again and again.partition("# Which norm")[2] == printed.partition("# Which norm")[2] != ""


def kill_after(rows: int, argv: list[str]) -> None:
    """Run the study, and die outright when so many rows are written."""

    def dying_cell(cell: Cell, folder: Path, **settings: Any) -> dict[str, Any]:
        if len(read_rows(Path(argv[argv.index("--out") + 1]) / "rows.jsonl")) == rows:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_cell(cell, folder, **settings)

    tempfile.tempdir = argv[argv.index("--out") + 1]  # which a killed study cannot clear
    page.run_cell = dying_cell  # type: ignore[attr-defined]
    main(argv)


def test_a_killed_study_goes_on_and_ends_with_the_same_rows(folder: Path, tmp_path: Path) -> None:
    shared = ["--norms", "gn", "--seeds", "1"]
    for name, deaths in (("killed", (2, -1)), ("whole", (-1,))):
        for rows in deaths:
            argv = command(folder, tmp_path / name, *shared)
            study = multiprocessing.get_context("fork").Process(target=kill_after, args=(rows, argv))
            study.start()
            study.join()
            assert study.exitcode == (0 if rows < 0 else -signal.SIGKILL)
    killed, whole = (read_rows(tmp_path / name / "rows.jsonl") for name in ("killed", "whole"))
    assert len(whole) == 4
    assert without_times(killed) == without_times(whole)


def untrained(cell: Cell, _folder: Path, **_settings: Any) -> dict[str, Any]:
    """Return a row by formula: gn is worth 10 points with 1 image in a forward."""
    ap = 0.3 + 0.01 * (cell.seed % 3) + (0.1 if (cell.recipe, cell.mini_batch) == ("gn", 1) else 0) - cell.rate
    measured = {"val_AP": ap, "test_AP": None if cell.role == "tune" else ap, "test_AP50": ap, "diverged": False}
    cost = {"step_s": 1.0, "memory_MB": 2.0, "seconds": 100.0, "commit": "abc", "date": "2026-01-01"}
    return {**asdict(cell), **measured, **cost, "machine": {"device": "cpu"}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "run_cell", untrained)


@pytest.mark.usefixtures("quick")
def test_rates_are_tuned_first_then_seeds_in_turn_and_advice_can_be_typed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(folder, tmp_path / "out", "--norms", "gn", "--seeds", "5")
    main([*argv, "--rates", "tune"])
    printed = capsys.readouterr().out
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert [row["role"] for row in rows] == 12 * ["tune"] + 20 * ["main"]
    assert [row["seed"] for row in rows[12:]] == [seed for seed in range(1, 6) for _ in range(4)]
    low, own, high = sorted({row["rate"] for row in rows})
    assert low == pytest.approx(own / 3, rel=0.01) and high == pytest.approx(own * 3, rel=0.01)
    assert {row["rate"] for row in rows[12:]} == {low} and f"{low:g}!" in printed
    (_, better), (_, none) = (part.split("\n\n    ")[:2] for part in printed.split("With ")[1:3])
    assert "gn is better than bn" in printed and "nothing was found to be better than bn" in printed
    typed = better.partition("\n")[0]
    assert typed.startswith("python train.py --data") and "--norm gn" in typed and "--subdivisions 2" in typed
    assert "--norm bn" in none and "--subdivisions 1" in none and f"--learning-rate {low:g}" in none


@pytest.mark.usefixtures("quick")
def test_a_tuning_that_is_not_finished_shows_what_it_has(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(folder, tmp_path / "out", "--rates", "0.001", "0.002", "--hours", str(60 / 3600)))
    assert "tuning bn at 1, rate 0.001: AP " in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_no_training_starts_that_would_end_after_the_time(folder: Path, tmp_path: Path) -> None:
    """Of rows that say 100 seconds the first is not foreseen; after it a minute is too short."""
    main(command(folder, tmp_path / "out", "--hours", str(60 / 3600)))
    assert len(read_rows(tmp_path / "out" / "rows.jsonl")) == 1
    main(command(folder, tmp_path / "out", "--hours", str(160 / 3600), "--seeds", "1"))
    assert len(read_rows(tmp_path / "out" / "rows.jsonl")) == 4


@pytest.mark.usefixtures("quick")
def test_a_later_command_adds_norms_and_shows_those_it_names(folder: Path, tmp_path: Path) -> None:
    def shown(*flags: str) -> set[tuple[str, int]]:
        main(command(folder, tmp_path / "out", "--seeds", "1", *flags))
        lines = json.loads((tmp_path / "out" / "table.json").read_text())
        return {(line["recipe"], line["mini_batch"]) for line in lines}

    assert shown("--norms", "gn", "--images-per-forward", "1") == {("bn", 1), ("gn", 1)}
    both = {(norm, images) for norm in ("bn", "ln") for images in (1, 2)}
    assert shown("--norms", "ln", "--rates", "tune") == both
    assert len(read_rows(tmp_path / "out" / "rows.jsonl")) == 2 + 3 * 4 + 4


@pytest.mark.usefixtures("quick")
def test_a_row_that_lacks_values_is_named_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    argv, rows = command(folder, tmp_path / "out", "--seeds", "1"), tmp_path / "out" / "rows.jsonl"
    main(argv)
    whole = rows.read_text()
    for damaged, message in (
        ("5\n", "is not a row of JSON"),
        ('{"role": "main"}\n', "lacks commit, data, .* that line"),
    ):
        rows.write_text(whole + damaged)
        with pytest.raises(UserError, match=rf"rows\.jsonl:5: {message}"):
            main(argv)
        assert rows.read_text() == whole + damaged


@pytest.mark.usefixtures("quick")
def test_the_start_says_what_is_wrong_with_the_images_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = voc(tmp_path / "pets", 10)
    (folder / "Annotations" / "image3.xml").write_text("")
    main(command(folder, tmp_path / "out", "--seeds", "1"))
    printed = capsys.readouterr().out
    assert printed.count("image3.xml") == 1 and f"python -m data.doctor {folder}  has details" in printed


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("change", ["data", "mosaic", "cfg"])
def test_rows_of_another_study_are_not_mixed(change: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(command(folder, out, "--seeds", "1"))
    other = command(voc(tmp_path / "pets", 11) if change == "data" else folder, out, "--seeds", "1")
    if change == "mosaic":
        other[other.index("--train") + 1] += " --mosaic 0"
    if change == "cfg":
        (tmp_path / "mine.cfg").write_text(f"# mine\n{load_plan('yolov4-pico').source_text}")
        other += ["--cfg", str(tmp_path / "mine.cfg")]
    with pytest.raises(UserError, match=f"had another {change} .*--out"):
        main(other)
    rows = (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text(rows.replace('"device": "cpu"', '"device": "another"'))
    main(command(folder, out, "--seeds", "2"))
    assert len(read_rows(out / "rows.jsonl")) == 8, "another machine is only noted"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--norms", "bm"], "unknown norm 'bm'"),
        (["--norms", "frozen"], "'frozen' keeps the running statistics of trained weights: give some with --weights"),
        (["--norms", "bn --clip-norm 1"], "is not about the norm"),
        (["--images-per-forward", "3"], "--images-per-forward 3 does not divide a batch of 2 images"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--train", "--seed 3"], "--train: --seed is --seeds here"),
        (["--train", '--epochs "3'], "no closing quotation"),
        (["--train", "--norm gn"], "goes into --norms"),
        (["--train", "--time-budget 3h"], "would give slower norms fewer steps"),
        (["--rates", "fast"], "--rates fast: give numbers above 0"),
        (["--rates", "0.1", "-1"], "give numbers above 0"),
        (["--train", "--batch-size 8 --image-size 32"], "has 6 images to train on, fewer than a batch of 8"),
        (["--weights", "none.pt"], "none.pt"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(
    more: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((UserError, OSError), match=message):
        main(command(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --data PATH, or --preset"),
        (["--data", "x", "--preset", "quick"], "give --data PATH, or --preset"),
        (["--preset", "quick", "--weights", "w.pt"], "--preset has settings of its own: --weights"),
        (["--data", "x", "--images-per-forward", "0"], "must be a number of at least 1"),
        *((["--data", "x", "--seeds", seeds], seeds) for seeds in ("0", "5-4", "0-3", "some")),
        *(
            (["--data", "x", "--hours", hours], f"{hours} must be a number of hours")
            for hours in ("0", "-1", "nan", "8h")
        ),
        *((["--data", "x", flag, "-2"], "-2 must be a number of at least 0") for flag in ("--jobs", "--workers")),
        (["--data", "one", "two"], "takes one data set here, found one and two: run a study of each"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and message in error and error.count("\n") == 1


def test_a_batch_is_the_recipes_or_the_next_that_the_most_images_divide(tmp_path: Path) -> None:
    def batch(*more: str) -> int:
        flags = ["--data", str(roboflow_of_60), "--rates", "default", "--train", "--epochs 5 --image-size 32"]
        return own_study(parse([*flags, *more])).grid.batch_size

    roboflow_of_60 = roboflow(tmp_path, train=60, valid=4, test=4)
    assert batch("--images-per-forward", "1", "2") == 8
    assert batch("--images-per-forward", "1", "16") == 16
    assert batch("--images-per-forward", "12") == 12
    # The cfg's 8 subdivisions do not divide this one.
    sgd = ["--cfg", "yolov4", "--train", "--optimizer sgd --batch-size 4 --epochs 1 --image-size 64"]
    assert batch("--images-per-forward", "4", *sgd) == 4


def test_a_norm_with_statistics_that_stay_has_a_rate_of_its_own(folder: Path, tmp_path: Path) -> None:
    """As train.py's recipe gives it."""
    run = tmp_path / "run"
    train.main(["--data", str(folder), "--max-steps", "1", "--image-size", "32", "--workers", "0", "--out", str(run)])
    flags = command(folder, tmp_path / "out", "--norms", "frozen", "--weights", str(run / "best.pt"))
    rates = own_study(parse(flags)).grid.own_rates
    assert rates["frozen", 1][0] == pytest.approx(rates["bn", 1][0] / 4, rel=0.01)
    assert json.dumps(own_study(parse(flags)).setup) != json.dumps(own_study(parse(flags[:-2][:-2])).setup)
