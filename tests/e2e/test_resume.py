"""Nothing that happens to a training may cost more than time: kills, signals, a full disk."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from cfg.parse import CfgError
from data.albumentations_import import albumentations as A
from data.digits import make_digits
from engine.job import open_run, parse_job
from engine.step import TrainStep
from engine.trainer import Trainer
from models.network import Network
from tests.e2e import children
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.memory import is_out_of_memory
from utils.stop import Stop
from utils.structures import Batch

NORMS = ("bn", "cmbn", "cbn:burn_in_steps=2")


def flags(scenes: Path, cfg: str, norm: str, run: Path, *more: str) -> list[str]:
    common = ["--data", str(scenes), "--cfg", cfg, "--norm", norm, "--epochs", "3", "--evals", "2", "--workers", "1"]
    common += ["--device", "cpu"]
    return [*common, "--save-minutes", "0", "--mosaic", "0.5", "--out", str(run), *more]


def all_that_is_drawn(pipeline: Path) -> list[str]:
    """Flags of the augmentation that is off by default."""
    A.save(A.Compose([A.Rotate(p=0.5), A.GaussNoise(p=0.5)]), pipeline)
    mixed = ["--mixup", "0.3", "--cutmix", "0.3", "--close-mosaic", "0.4", "--rotate", "20", "--flip-ud", "--balance"]
    return [*mixed, "--blur", "0.3", "--albumentations", str(pipeline)]


def seconds_of(start: list[str], log: Path) -> float:
    """What an uninterrupted training takes; the first child of all has waited before that for its server to import."""
    child = children.start(start, log=log)
    begun = time.monotonic()
    assert children.ended(child) == 0, log.read_text()[-3000:]
    return time.monotonic() - begun


def kill_until_done(start: list[str], run: Path, log: Path, *, kills: int, rng: random.Random, typical_s: float) -> int:
    """How often it was killed. After each kill, last.pt is readable or not there yet."""
    killed = 0
    while True:
        resumable = (run / "last.pt").exists()
        if not resumable and run.exists():
            for left in run.rglob("*"):
                left.unlink() if left.is_file() else None
            for left in sorted(run.rglob("*"), reverse=True):
                left.rmdir()
        again = ["--resume", str(run), "--workers", "1", "--save-minutes", "0"]
        child = children.start(again if resumable else start, log=log)
        if killed == kills:
            assert children.ended(child) == 0, log.read_text()[-3000:]
            return killed
        # The first one early: on a machine that was busy when `typical_s` was measured, a late one would miss.
        if not children.killed_after(child, rng.uniform(0, (0.8 if killed else 0.4) * typical_s)):
            return killed
        killed += 1
        if (run / "last.pt").exists():
            assert Checkpoint.from_file(run / "last.pt").training is not None


@pytest.mark.parametrize("norm", NORMS)
def test_a_killed_training_ends_like_one_that_was_not(scenes: Path, toy_cfg: str, tmp_path: Path, norm: str) -> None:
    more = all_that_is_drawn(tmp_path / "mine.json") if norm == "bn" else []
    took_s = seconds_of(flags(scenes, toy_cfg, norm, tmp_path / "whole", *more), tmp_path / "log")
    start = flags(scenes, toy_cfg, norm, tmp_path / "parts", *more)
    rng = random.Random(norm.partition(":")[0])
    killed = kill_until_done(start, tmp_path / "parts", tmp_path / "log", kills=2, rng=rng, typical_s=took_s)
    assert killed > 0
    children.assert_same_training(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_twenty_kills_change_nothing(scenes: Path, toy_cfg: str, tmp_path: Path, norm: str) -> None:
    more = ("--epochs", "20")
    took_s = seconds_of(flags(scenes, toy_cfg, norm, tmp_path / "whole", *more), tmp_path / "log")
    rng, killed, round_ = random.Random(norm), 0, 0
    while killed < 20:
        run = tmp_path / f"parts{round_}"
        start = flags(scenes, toy_cfg, norm, run, *more)
        killed += kill_until_done(start, run, tmp_path / "log", kills=20 - killed, rng=rng, typical_s=took_s / 3)
        children.assert_same_training(tmp_path / "whole", run)
        round_ += 1


@pytest.mark.parametrize(
    ("number", "optimizer"), [(signal.SIGTERM, "sgd"), (signal.SIGINT, "adamw"), (signal.SIGHUP, "sgd")]
)
def test_a_signal_stops_after_the_step_and_nothing_is_lost(
    scenes: Path, toy_cfg: str, tmp_path: Path, number: int, optimizer: str
) -> None:
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    train.main(flags(scenes, toy_cfg, "cmbn", whole, "--optimizer", optimizer))
    child = children.start(flags(scenes, toy_cfg, "cmbn", parts, "--optimizer", optimizer), log=log)
    children.wait_for_step(parts, 2)
    os.killpg(child.pid, number)  # as a terminal does: the loader's workers hear it, too
    assert children.ended(child) == 0, log.read_text()[-3000:]
    assert f"resume with: python train.py --resume {parts}" in log.read_text()
    assert "Traceback" not in log.read_text()
    train.main(["--resume", str(parts), "--workers", "1", "--save-minutes", "0"])
    children.assert_same_training(whole, parts)


def be_slow() -> None:
    whole = TrainStep.__call__
    TrainStep.__call__ = lambda *given: (time.sleep(0.05), whole(*given))[1]  # type: ignore[method-assign]


def test_a_training_killed_while_it_tests_learning_rates_tests_them_again(
    scenes: Path, toy_cfg: str, tmp_path: Path
) -> None:
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    auto = ("--learning-rate", "auto")
    child = children.start(flags(scenes, toy_cfg, "cbn:burn_in_steps=2", parts, *auto), log=log, before=be_slow)
    children.wait_for_step(parts, 0)
    child.kill()
    assert children.ended(child) == -signal.SIGKILL
    assert Checkpoint.from_file(parts / "last.pt").settings["learning_rate"] == "auto"
    train.main(["--resume", str(parts), "--workers", "1"])
    train.main(flags(scenes, toy_cfg, "cbn:burn_in_steps=2", whole, *auto))
    children.assert_same_training(whole, parts)


def hang() -> None:
    """A step that takes an hour."""
    train.Trainer.save_last = lambda *_: time.sleep(3600)  # type: ignore[method-assign]


def test_the_second_signal_ends_it_at_once(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    child = children.start(flags(scenes, toy_cfg, "bn", tmp_path / "run"), log=tmp_path / "log", before=hang)
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "settings.json").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGINT)
    assert children.ended(child) == 128 + signal.SIGINT


def fill_disk_after_the_first_checkpoint(run: Path) -> None:
    """No file may grow beyond 9 kB for five checkpoints after it (the log needs some): writes that fail half-way."""
    keep, calls = train.Trainer.save_last, []

    def save_last(training: train.Trainer) -> None:
        calls.append(1)
        full = 2 < len(calls) < 8
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        keep(training)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        left = Checkpoint.from_file(run / "last.pt")
        assert left.step == (training.steps_done if not full else 1), left.step

    train.Trainer.save_last = save_last  # type: ignore[method-assign]


def test_a_full_disk_costs_checkpoints_but_not_the_training(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    train.main(flags(scenes, toy_cfg, "cmbn", whole))

    fill_disk = partial(fill_disk_after_the_first_checkpoint, run)
    child = children.start(flags(scenes, toy_cfg, "cmbn", run), log=log, before=fill_disk)
    assert children.ended(child) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert said.count(f"error: {run / 'last.pt'} was not written (File too large)") == 5
    assert not list(run.glob("*.part"))
    children.assert_same_training(whole, run)


def fill_disk_for_good() -> None:
    end_epoch = train.Trainer.end_epoch

    def then_full(training: train.Trainer, epoch: int, table: object) -> None:
        end_epoch(training, epoch, table)  # type: ignore[arg-type]
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))

    train.Trainer.end_epoch = then_full  # type: ignore[method-assign]


def test_a_disk_that_fills_for_good_ends_the_training_with_an_error(
    scenes: Path, toy_cfg: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was saved before is whole, and goes on when there is room."""
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    train.main(flags(scenes, toy_cfg, "cmbn", whole, "--workers", "0"))
    child = children.start(flags(scenes, toy_cfg, "cmbn", run, "--workers", "0"), log=log, before=fill_disk_for_good)
    assert children.ended(child) == 2
    assert f" could not be written; make room, and go on with --resume {run}\n" in log.read_text()
    assert Checkpoint.from_file(run / "last.pt").step == 4
    train.main(["--resume", str(run), "--workers", "0"])
    children.assert_same_training(whole, run)


def test_memory_that_ran_out_in_training_and_in_evaluation_costs_only_time(
    scenes: Path, toy_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of 4 images fit; the run goes on, evaluates, and after --resume still knows."""
    forward = Network.forward

    def limited(network: Network, images: torch.Tensor) -> object:
        if len(images) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return forward(network, images)

    monkeypatch.setattr(Network, "forward", limited)
    common = flags(scenes, toy_cfg, "gn", tmp_path / "run", "--subdivisions", "1", "--workers", "0")
    train.main([*common, "--epochs", "1"])
    assert "going on with --subdivisions 2, 2 images each" in capsys.readouterr().out
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "2", "--workers", "0"])
    assert "out of memory" not in capsys.readouterr().out
    assert Checkpoint.from_file(tmp_path / "run" / "last.pt").training.subdivisions == 2
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "3", "--workers", "0", "--subdivisions", "4"])
    assert Checkpoint.from_file(tmp_path / "run" / "last.pt").training.subdivisions == 4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_auto_chose_is_kept_to_the_last_bit_on_a_machine_that_would_choose_otherwise(
    scenes: Path, toy_cfg: str, tmp_path: Path, monkeypatch, capsys, optimizer: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr("utils.fast_precision.cpu_bf16", lambda: "avx512_bf16")
    common = ("--workers", "0", "--optimizer", optimizer)
    trained(flags(scenes, toy_cfg, "cmbn:carry", whole, *common))
    assert "precision bf16, channels last: the CPU has avx512_bf16\n" in capsys.readouterr().out
    settings = json.loads((whole / "settings.json").read_text())
    assert (settings["amp"], settings["channels_last"]) == ("bf16", "on")

    step = TrainStep.__call__

    def interrupted(self: TrainStep, batch: Batch) -> torch.Tensor:
        if self.clock.step == 6:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "__call__", interrupted)
        trained(flags(scenes, toy_cfg, "cmbn:carry", parts, *common))
    monkeypatch.setattr("utils.fast_precision.cpu_bf16", lambda: "")
    capsys.readouterr()
    trained(["--resume", str(parts), "--workers", "0"])
    assert "precision bf16, channels last\n" in capsys.readouterr().out
    children.assert_same_training(whole, parts)


def fill_disk_at_the_end() -> None:
    publish = train.publish

    def on_a_full_disk(*given: object, **named: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        publish(*given, **named)  # type: ignore[arg-type]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    train.publish = on_a_full_disk


def test_a_disk_that_is_full_at_the_end_leaves_the_table(
    scenes: Path, toy_cfg: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"

    # Without workers, whose shared memory is files, too.
    child = children.start(flags(scenes, toy_cfg, "bn", run, "--workers", "0"), log=log, before=fill_disk_at_the_end)
    assert children.ended(child) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert f"error: {run / 'best.safetensors'} was not written (File too large)" in said
    assert "Average Precision" in said and Checkpoint.from_file(run / "best.pt").step > 0


def test_resume_alone_goes_on_with_the_newest_run(scenes: Path, toy_cfg: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run to resume"):
        train.main(["--resume"])
    for epochs in ("1", "2"):
        train.main(["--data", str(scenes), "--cfg", toy_cfg, "--epochs", epochs, "--workers", "0"])
    newest = tmp_path / "runs" / "scenes-toy-cmbn-carry-2"
    assert Checkpoint.from_file(newest / "last.pt").step == 8
    train.main(["--resume", "--epochs", "3", "--workers", "0"])
    assert Checkpoint.from_file(newest / "last.pt").step == 12


def test_a_training_of_an_earlier_format_is_refused(scenes: Path, toy_cfg: str, tmp_path: Path, monkeypatch) -> None:
    train.main(
        ["--data", str(scenes), "--cfg", toy_cfg, "--epochs", "1", "--workers", "0", "--out", str(tmp_path / "a")]
    )
    monkeypatch.setattr("engine.resuming.RESUMABLE_FROM", 1000)
    with pytest.raises(UserError, match=r"earlier version .* start a new run from its weights"):
        train.main(["--resume", str(tmp_path / "a")])


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


def test_a_training_that_cannot_be_saved_says_so_at_once_and_ends(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    child = children.start(flags(scenes, toy_cfg, "bn", run, "--workers", "0"), log=log, before=fill_disk)
    assert children.ended(child) == 2
    with open(log) as file:  # which is on the full disk, too
        assert f"error: {run / 'last.pt'} was not written (File too large)\nerror: {run}: nothing that" in file.read()
    assert [path.name for path in run.iterdir() if path.suffix in (".pt", ".part", ".png", ".json")] == []


# --- the run's folder and its data set are not what they were ---------------------------------------------------


@pytest.fixture
def resume() -> Callable[..., None]:
    """`train.py --resume RUN FLAGS`, without the tables and plots of its end."""
    return lambda run, *more: trained(["--resume", str(run), "--workers", "0", *more])


@pytest.fixture(scope="module")
def once(scenes: Path, toy_cfg: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, which is 4 steps of 4 images."""
    run = tmp_path_factory.mktemp("once") / "run"
    trained(flags(scenes, toy_cfg, "bn", run, "--epochs", "1", "--workers", "0"))
    return run


def trained(argv: list[str]) -> None:
    job = parse_job(argv)
    train.train(job, open_run(job))


def copied(once: Path, folder: Path, **changed: object) -> Path:
    """Its last.pt alone, with other entries."""
    folder.mkdir()
    replace(Checkpoint.from_file(once / "last.pt"), **changed).to_file(folder / "last.pt")
    return folder


def rows_of(run: Path) -> list[dict[str, str]]:
    path = run / "results.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def test_a_folder_that_cannot_be_written_to_is_told_before_the_training(once: Path, resume, monkeypatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(train, "Trainer", None)
    for place in (once, once / "last.pt"):
        with pytest.raises(UserError, match=f"^{once}: cannot be written to, Read-only file system$"):
            resume(place, "--epochs", "2")


@pytest.mark.parametrize("swapped", ["last.pt", "best.pt"])
def test_a_checkpoint_of_another_run_is_named(once: Path, resume, tmp_path: Path, swapped: str) -> None:
    run, other = tmp_path / "run", {"last.pt": "settings.json", "best.pt": "best.pt"}[swapped]
    shutil.copytree(once, run)
    (run / ".lock").unlink()
    of_another = replace(Checkpoint.from_file(run / swapped), run_id="another")
    of_another.to_file(run / swapped)
    with pytest.raises(UserError, match=f"^{run / 'last.pt'}: is of another run than {other} beside it"):
        resume(run, "--epochs", "2")


@pytest.mark.parametrize(
    ("part", "spoiled"),
    [
        ("state", {"ranks": []}),
        ("state", {"optimizer": {}}),
        ("state", {"network": {}}),
        ("log", {"loss_watch": {"first": [["a"]], "last": []}}),
        ("state", {"ranks": [{"buffers": {}, "averaged_buffers": {}, "norm_histories": {}, "random": -1}]}),
        ("log", {"patience": 3}),
    ],
)
def test_a_checkpoint_without_all_it_takes_is_named(once: Path, resume, tmp_path: Path, part: str, spoiled) -> None:
    training = Checkpoint.from_file(once / "last.pt").training
    run = copied(once, tmp_path / "run", training=replace(training, **{part: {**getattr(training, part), **spoiled}}))
    with pytest.raises(UserError, match=f"^{run}: does not hold the state of this training"):
        resume(run, "--epochs", "2")


@pytest.mark.parametrize(
    "spoiled",
    [
        *({"momentum": 99}, {"batch_size": 0}, {"norm": "unheard-of"}, {"rotate": -1}, {"cache": "tape"}),
        *({"mosaic": ""}, {"jitter": None}, {"norm_heads": ["a"]}, {"multi_scale": (1, 2)}, {"albumentations": "x"}),
        *({"learning_rate": torch.zeros(3)}, {"lr_steps": (1, "a")}, {"device": 3}, {"loss": None}),
    ],
)
def test_settings_that_cannot_be_are_named(once: Path, tmp_path: Path, spoiled: dict[str, object]) -> None:
    settings = {**Checkpoint.from_file(once / "last.pt").settings, **spoiled}
    run = copied(once, tmp_path / "run", settings=settings)
    with pytest.raises(UserError, match=f"^{run}: its settings cannot be used"):
        parse_job(["--resume", str(run)])


ODD = (None, "", -1, 3, 1e30, math.nan, True, [], {}, ["a"], (1, 2), torch.zeros(3), torch.tensor(2), 10**30, b"x")


def places_in(content: object, place: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    yield place
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield from places_in(content[key], (*place, key))


def replaced(content: Any, place: tuple[object, ...], value: object) -> Any:
    if not place:
        return value
    key, rest = place[0], place[1:]
    changed = dict(content) if isinstance(content, dict) else list(content)
    changed[key] = replaced(content[key], rest, value)
    return changed


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_any_entry_of_a_checkpoint_may_be_of_another_kind(once: Path, resume, tmp_path: Path, count: int) -> None:
    """The training goes on, or a sentence says why it cannot."""
    content = torch.load(once / "last.pt", weights_only=True)
    rng, outcomes = random.Random(count), Counter[str]()
    groups: dict[object, list[tuple[object, ...]]] = {}
    for place in places_in(content):
        groups.setdefault(place[:2], []).append(place)  # or the thousands of random states would be most of all
    for number in range(count):
        run = tmp_path / str(number)
        run.mkdir()
        place = rng.choice(groups[rng.choice(list(groups))])
        torch.save(replaced(content, place, rng.choice(ODD)), run / "last.pt")
        try:
            resume(run, "--epochs", "2")
            outcomes["went on"] += 1
        except (UserError, CfgError):
            outcomes["told"] += 1
        except Exception as error:
            assert is_out_of_memory(error), place  # the page tells that
        shutil.rmtree(run)
    assert outcomes["told"] > count / 4


def test_all_that_was_trained_is_said_to_be(once: Path, resume, tmp_path: Path, capsys) -> None:
    resume(copied(once, tmp_path / "run"))
    assert "warning: the run has 4 steps: nothing is left to train; --epochs with a" in capsys.readouterr().out


def test_the_data_set_may_have_moved(once: Path, scenes: Path, resume, tmp_path: Path, monkeypatch) -> None:
    settings = {**Checkpoint.from_file(once / "last.pt").settings, "data": "scenes"}
    run = copied(once, tmp_path / "run", settings=settings)
    shutil.copytree(scenes, tmp_path / "here" / "scenes")
    with pytest.raises(UserError, match=f"^{run}: its data set scenes is not found from .*; --data may name where"):
        parse_job(["--resume", str(run)])
    moved = str(tmp_path / "here" / "scenes")
    resume(run, "--data", moved, "--epochs", "2")
    assert Checkpoint.from_file(run / "last.pt").settings["data"] == (moved,)
    monkeypatch.chdir(tmp_path / "here")
    earlier = copied(once, tmp_path / "relative", settings=settings)
    assert parse_job(["--resume", str(earlier)]).options.data == ("scenes",)


def test_a_run_keeps_its_pipeline_and_closes_mosaic_by_its_length(
    scenes: Path, toy_cfg: str, resume, tmp_path: Path, capsys
) -> None:
    file, run = tmp_path / "mine.json", tmp_path / "run"
    trained(flags(scenes, toy_cfg, "bn", run, "--epochs", "1", "--workers", "0", *all_that_is_drawn(file)))
    shown = "--albumentations (Rotate, GaussNoise)"
    assert shown in (out := capsys.readouterr().out) and "the rarest class, is in" in out
    file.unlink()
    resume(run, "--epochs", "2")
    assert shown in (out := capsys.readouterr().out) and "names another pipeline" not in out
    job = parse_job(["--resume", str(run), "--epochs", "5"])
    assert Trainer(job, tmp_path / "other", Stop()).loader.keys.single_from == 12  # of 20 steps
    A.save(A.Blur(), file)
    parse_job(["--resume", str(run), "--albumentations", str(file)])
    assert "warning: --albumentations names another pipeline than the run had" in capsys.readouterr().out


def test_a_run_saved_before_out_got_its_name_goes_on(once: Path, tmp_path: Path) -> None:
    settings = dict(Checkpoint.from_file(once / "last.pt").settings)
    settings["run"] = settings.pop("out")
    job = parse_job(["--resume", str(copied(once, tmp_path / "run", settings=settings)), "--epochs", "2"])
    assert job.options.out == settings["run"] == str(once)


@pytest.mark.parametrize(("images", "epochs", "trained"), [(8, 4, [3, 4]), (8, 2, []), (24, 2, [1, 2]), (3, 6, [5, 6])])
def test_with_another_number_of_images_its_steps_say_where_it_goes_on(
    once: Path, resume, tmp_path: Path, capsys, images: int, epochs: int, trained: list[int]
) -> None:
    """Each epoch of them has batches, and a row with their losses."""
    run = copied(once, tmp_path / "run")
    other = make_digits(tmp_path / "other", counts={"train": images, "val": 2}, hw=(64, 64))
    resume(run, "--data", str(other), "--epochs", str(epochs))
    assert (
        "warning: the run had 16 training images before: the epochs done are recounted from its steps"
        in capsys.readouterr().out
    )
    rows = rows_of(run)
    assert [int(row["epoch"]) for row in rows] == trained
    assert all(float(row["loss"]) > 0 for row in rows)
    last = Checkpoint.from_file(run / "last.pt")
    assert last.train_images == images and last.step == max(4, epochs * max(1, images // 4))


def test_a_checkpoint_that_does_not_say_how_many_images_goes_on(once: Path, resume, tmp_path: Path, capsys) -> None:
    run = copied(once, tmp_path / "run", train_images=None)
    resume(run, "--epochs", "2")
    assert [row["epoch"] for row in rows_of(run)] == ["2"]
    assert "training images before" not in capsys.readouterr().out


@pytest.mark.parametrize("epochs", [1, 2])
def test_without_its_best_weights_a_run_makes_new_ones(once: Path, resume, tmp_path: Path, capsys, epochs: int) -> None:
    """However good they had been; and also where all is trained."""
    run = copied(once, tmp_path / "run", best_ap=0.9)
    resume(run, "--epochs", str(epochs))
    assert f"warning: {run / 'best.pt'} does not exist: the next evaluation writes one" in capsys.readouterr().out
    best, last = (Checkpoint.from_file(run / name) for name in ("best.pt", "last.pt"))
    assert best.step == 4 * epochs and best.best_ap == last.best_ap < 0.9


def test_with_its_best_weights_a_run_keeps_them_until_there_are_better_ones(once: Path, resume, tmp_path: Path) -> None:
    run = copied(once, tmp_path / "run", best_ap=0.9)
    shutil.copy(once / "best.pt", run)
    resume(run, "--epochs", "2")
    assert Checkpoint.from_file(run / "best.pt").step == 4 and Checkpoint.from_file(run / "last.pt").best_ap == 0.9
