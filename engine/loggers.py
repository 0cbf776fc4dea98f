"""What --logger names: libraries that draw curves, and listeners of the user's own.

A library is imported only if it is asked for. A resumed training goes on with its curves there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from engine.background import Background
from engine.events import Listener, Record, Run
from models.norms.own import check_trust, trust
from utils.console import warn
from utils.errors import UserError

PROJECT = "yolov4-norms"  # unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT name another


class CurveLogger(Listener):
    """Logs the scalars and images of steps and evaluations. A subclass imports its library when it is made."""

    def step(self, record: Record) -> None:
        self.log(record)

    def evaluation(self, record: Record) -> None:
        self.log(record)

    def error(self, error: BaseException) -> None:
        self.end()

    def log(self, record: Record) -> None:
        raise NotImplementedError


class TensorBoard(CurveLogger):
    """tensorboard/ in the run folder."""

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter

    def start(self, run: Run) -> None:
        threading.excepthook = _leave_to_the_writer
        # Hides the steps that a training that was killed had logged after its last checkpoint.
        self._board = self._make(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def log(self, record: Record) -> None:
        for name, value in record.scalars.items():
            self._board.add_scalar(name, value, record.step)
        for name, rgb in record.images.items():
            self._board.add_image(name, rgb, record.step, dataformats="HWC")

    def end(self) -> None:
        self._board.close()


class WeightsAndBiases(CurveLogger):
    """Weights & Biases; WANDB_MODE=offline keeps it on this machine, in wandb/ in the run folder."""

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb

    def start(self, run: Run) -> None:
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.name,
            id=run.run_id,
            resume="allow",
            config=dict(run.settings),
            dir=str(run.folder),
            settings=self._wandb.Settings(console="off"),  # stdout stays as it is
        )

    def log(self, record: Record) -> None:
        images = {name: self._wandb.Image(rgb) for name, rgb in record.images.items()}
        self._run.log({**record.scalars, **images}, step=record.step)

    def end(self) -> None:
        self._run.finish()

    def error(self, error: BaseException) -> None:
        self._run.finish(exit_code=1)


class MLflow(CurveLogger):
    """MLflow, at MLFLOW_TRACKING_URI or where it is by default. Scalars are sent a few hundred at a time."""

    _MOST, _EVERY_S = 900, 10.0  # it takes 1000 at once

    def __init__(self) -> None:
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities, self._client = entities, MlflowClient()
        self._metrics: list[Any] = []
        self._sent_s = time.monotonic()

    def start(self, run: Run) -> None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        if earlier := self._client.search_runs([experiment], f"tags.training = '{run.run_id}'"):
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"training": run.run_id}
        self._id = self._client.create_run(experiment, tags=tags, run_name=run.folder.name).info.run_id
        params = [self._entities.Param(name, str(value)[:500]) for name, value in run.settings.items()]
        for first in range(0, len(params), 100):  # as many as it takes at once
            self._client.log_batch(self._id, params=params[first : first + 100])

    def log(self, record: Record) -> None:
        now_ms = int(time.time() * 1000)
        self._metrics += [self._entities.Metric(*pair, now_ms, record.step) for pair in record.scalars.items()]
        if len(self._metrics) > self._MOST or time.monotonic() - self._sent_s > self._EVERY_S:
            self._send()
        for name, rgb in record.images.items():
            self._client.log_image(self._id, rgb, key=name, step=record.step)

    def end(self) -> None:
        self._send()
        self._client.set_terminated(self._id)

    def error(self, error: BaseException) -> None:
        self._send()
        self._client.set_terminated(self._id, status="FAILED")

    def _send(self) -> None:
        for first in range(0, len(self._metrics), self._MOST):
            self._client.log_batch(self._id, metrics=self._metrics[first : first + self._MOST])
        self._metrics, self._sent_s = [], time.monotonic()


class Trackio(CurveLogger):
    """Trackio, in TRACKIO_DIR or where it is by default."""

    def __init__(self) -> None:
        import trackio

        self._trackio = trackio

    def start(self, run: Run) -> None:
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.folder.name}-{run.run_id[:8]}",  # it resumes by name
            config={name: str(value) for name, value in run.settings.items()},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, record: Record) -> None:
        images = {name: self._trackio.Image(rgb) for name, rgb in record.images.items()}
        self._run.log({**record.scalars, **images}, step=record.step)

    def end(self) -> None:
        self._run.finish()


LOGGERS: dict[str, type[CurveLogger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
NONE = "none"


def check_loggers(names: Sequence[str], *, is_typed: bool) -> None:
    """Raise UserError for a name that is none of a logger, and for a module of the user's that is not trusted.

    is_typed: by the user, now; a module that is typed is trusted, one that a checkpoint names must be.
    """
    for name in names:
        module, colon, _ = name.partition(":")
        if colon:
            if is_typed:
                trust(module)
            _own_class(name)
        elif name not in LOGGERS and (name != NONE or len(names) > 1):
            one_of = ", ".join((*LOGGERS, NONE))
            raise UserError(f"--logger {name}: choose of {one_of}, or write MODULE:CLASS of a listener of your own")


def open_loggers(names: Sequence[str]) -> list[Listener]:
    """Return the loggers of these names, each in a thread of its own; without names TensorBoard, where it is installed.

    One that cannot be imported is a warning, if it was asked for.
    """
    opened: list[Listener] = []
    for name in names or ("tensorboard",):
        if name == NONE:
            continue
        try:
            opened.append(Background(_own_class(name)() if ":" in name else LOGGERS[name](), name))
        except (Exception, SystemExit) as error:
            is_missing = isinstance(error, ModuleNotFoundError) and error.name == name
            if is_missing and names:
                warn(f"{name} is not installed, nothing is logged to it: pip install -e .[{name}]")
            elif not is_missing:
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                warn(f"nothing is logged to {name}, which cannot be loaded ({reason})")
    return opened


def _own_class(name: str) -> type[Listener]:
    """Return the class MODULE:CLASS. Raises UserError if the module is not trusted or has no such listener."""
    module, _, class_name = name.partition(":")
    check_trust(module, f"the logger {name}")
    found = getattr(sys.modules[module], class_name, None)
    if not (isinstance(found, type) and issubclass(found, Listener)):
        raise UserError(f"--logger {name}: the module {module} has no class {class_name} of engine.events.Listener")
    return found


def _leave_to_the_writer(error: threading.ExceptHookArgs) -> None:
    """Print an error of a thread, but not one of a full disk: TensorBoard's raises it at the next call, too."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)
