"""What --logger names: libraries, offline, and listeners of the user's own, only if their module is trusted."""

from __future__ import annotations

import builtins
import random
import sqlite3
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from engine.events import Listener, Listeners, Record, Run
from engine.loggers import LOGGERS, check_loggers, open_loggers
from models.norms import own
from utils.errors import UserError

IMAGE = np.zeros((4, 4, 3), np.uint8)


def train(folder: Path, name: str, steps: range, *, error: Exception | None = None) -> None:
    """Tell a logger of these steps, and of an evaluation after the last."""
    listeners = Listeners(open_loggers([name]))
    settings = {"norm": "cmbn", "data": ("digits",), "epochs": None}
    run = Run(folder=folder, run_id="a" * 32, settings=settings, step=steps[0] - 1, epochs_done=0)
    listeners.tell("start", run)
    for step in steps:
        listeners.tell("step", Record(step=step, epoch=1, scalars={"train/loss": 10.0 / step}))
    scalars = {"val/AP": 0.25, "norm/mini_batch_worst": 0.5}
    last = Record(step=steps[-1], epoch=1, scalars=scalars, images={"predictions": IMAGE})
    listeners.tell("evaluation", last)
    listeners.tell("end") if error is None else listeners.tell("error", error)


def test_tensorboard_has_one_curve_of_a_training_that_was_killed_and_resumed(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, "tensorboard", range(1, 7))
    train(tmp_path, "tensorboard", range(4, 10))  # the last checkpoint was after step 3
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    events = read.Scalars("train/loss")
    assert [event.step for event in events] == [*range(1, 10)]
    assert [event.value for event in events] == pytest.approx([10 / step for step in range(1, 10)])
    assert read.Tags()["images"] == ["predictions"]
    assert [event.step for event in read.Scalars("val/AP")] == [9]


@pytest.mark.slow
def test_mlflow_has_one_run_of_a_training_that_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    before = random.getstate()
    train(tmp_path / "run", "mlflow", range(1, 4))
    train(tmp_path / "run", "mlflow", range(4, 10), error=ValueError("a"))
    assert random.getstate() == before, "the training's random numbers are its own"
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("yolov4-norms")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED" and run.info.run_name == "run" and run.data.params["norm"] == "cmbn"
    curve = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in curve) == [*range(1, 10)]
    assert client.list_artifacts(run.info.run_id, "images")


@pytest.mark.slow
def test_wandb_offline_writes_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = random.getstate()
    for steps in (range(1, 4), range(4, 10)):
        train(tmp_path, "wandb", steps)
    assert random.getstate() == before
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{'a' * 32}/*.wandb"))
    text = b"".join(path.read_bytes() for path in files)
    assert files and b"train/loss" in text and b"val/AP" in text and b"cmbn" in text


@pytest.mark.slow
def test_trackio_has_one_local_run_of_a_training_that_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    for steps in (range(1, 4), range(4, 10)):
        train(tmp_path / "run", "trackio", steps)
    (path,) = tmp_path.glob("yolov4-norms.db")
    with sqlite3.connect(path) as db:
        rows = db.execute("select run_name, step from metrics order by step").fetchall()
    assert {step for _, step in rows} == {*range(1, 10)}
    assert {name for name, _ in rows} == {"run-aaaaaaaa"}


@pytest.mark.parametrize("name", LOGGERS)
def test_a_library_that_is_missing_is_a_warning_if_it_was_asked_for(name, monkeypatch, capsys) -> None:
    real = builtins.__import__

    def missing(module: str, *args: object) -> object:
        if module.split(".")[0] == name or (name == "tensorboard" and "tensorboard" in module):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(module, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert open_loggers([name]) == []
    assert capsys.readouterr().out == (
        f"warning: {name} is not installed, nothing is logged to it: pip install -e .[{name}]\n"
    )
    if name == "tensorboard":
        assert open_loggers([]) == [] and capsys.readouterr().out == ""


def test_a_library_that_is_broken_is_a_warning(monkeypatch, capsys) -> None:
    monkeypatch.setitem(LOGGERS, "wandb", lambda: 1 / 0)
    assert open_loggers(["wandb"]) == []
    said = "warning: nothing is logged to wandb, which cannot be loaded (ZeroDivisionError: division by zero)\n"
    assert capsys.readouterr().out == said


def test_a_library_that_ends_the_program_does_not_end_the_training(monkeypatch, capsys) -> None:
    monkeypatch.setitem(LOGGERS, "wandb", lambda: sys.exit("no key"))
    assert open_loggers(["wandb"]) == []
    said = "warning: nothing is logged to wandb, which cannot be loaded (SystemExit: no key)\n"
    assert capsys.readouterr().out == said


def test_none_is_nobody_and_stands_alone() -> None:
    check_loggers(("none",), is_typed=True)
    assert open_loggers(["none"]) == []
    with pytest.raises(UserError, match="logger none: choose of tensorboard, wandb, mlflow, trackio, none, or write"):
        check_loggers(("none", "wandb"), is_typed=True)


def test_a_name_that_is_none_of_a_logger_is_refused() -> None:
    with pytest.raises(UserError, match="logger tensorbord: choose of tensorboard, wandb"):
        check_loggers(("tensorbord",), is_typed=True)


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"my_listeners_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(
        "from engine.events import Listener\nheard = []\n"
        "class Mine(Listener):\n    def step(self, record):\n        heard.append(record.step)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    own._trusted.discard(name)
    sys.modules.pop(name, None)


def test_a_listener_of_the_users_own_is_told_if_they_typed_it(my_module: str, tmp_path: Path) -> None:
    check_loggers((f"{my_module}:Mine",), is_typed=True)
    train(tmp_path, f"{my_module}:Mine", range(1, 4))
    assert sys.modules[my_module].heard == [1, 2, 3]


def test_one_that_only_a_file_names_is_not_imported_unless_its_module_is_trusted(my_module: str) -> None:
    with pytest.raises(UserError, match=f"if you trust it, type --trust {my_module}$"):
        check_loggers((f"{my_module}:Mine",), is_typed=False)
    assert my_module not in sys.modules
    own.trust(my_module)
    check_loggers((f"{my_module}:Mine",), is_typed=False)
    with pytest.raises(UserError, match=f"the module {my_module} has no class heard of engine.events.Listener"):
        check_loggers((f"{my_module}:heard",), is_typed=False)


def test_a_logger_has_a_thread_of_its_own(my_module: str, tmp_path: Path) -> None:
    threads: list[threading.Thread] = []
    check_loggers((f"{my_module}:Mine",), is_typed=True)
    sys.modules[my_module].Mine.start = lambda self, run: threads.append(threading.current_thread())
    train(tmp_path, f"{my_module}:Mine", range(1, 2))
    assert threads[0] is not threading.main_thread()
    assert issubclass(sys.modules[my_module].Mine, Listener)
