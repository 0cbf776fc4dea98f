"""What is measured of a training while it runs, and told to its listeners."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from engine.console_log import ConsoleLog
from engine.epoch_record import EpochRecord, named
from engine.events import Listener, Listeners, Record, Run
from engine.forecast import Forecast
from engine.loggers import open_loggers
from engine.result_files import ResultFiles
from engine.run_length import RunLength
from evaluation.coco_map import CocoTable
from evaluation.domains import DomainTable
from models.norms.health import NormHealth, summary
from utils import ranks
from utils.atomic_file import warn_on_disk_error
from utils.console import line
from utils.draw import write_png
from utils.structures import Batch


class TrainingLog:
    """Measures losses, speed, and the health of the norms, and tells the listeners; only the console before `begin`.

    length: None if it is not known yet. step: how many are done. evaluation_batches: of the size of a training batch.
    """

    def __init__(
        self, folder: Path, network: nn.Module, *, length: RunLength | None, step: int, evaluation_batches: float
    ) -> None:
        self.folder, self.length, self.step = folder, length, step
        self._console = ConsoleLog(total_steps=length.total_steps if length else None, step=step)
        self._listeners = Listeners([self._console])
        self._epoch, self._forecast = EpochRecord(), Forecast(evaluation_batches=evaluation_batches)
        self._norm_health = NormHealth(network)
        self._images: dict[str, np.ndarray] = {}  # for the next record

    def begin(self, run: Run, *, loggers: Sequence[str], listeners: Sequence[Listener]) -> None:
        """Open the loggers, by name, and tell them and `listeners` that the training begins or goes on."""
        opened = open_loggers(loggers) if ranks.is_rank_zero() else []
        self._listeners = Listeners([self._console, ResultFiles(run.folder), *opened, *listeners])
        self._listeners.tell("start", run)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        self._console.say(text)

    def set_length(self, length: RunLength) -> None:
        self.length = length
        self._console.set_length(length.total_steps)

    def watch(self, batches: Iterable[Batch], epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, from 0; after the first few of the run, print how long it will take."""
        for batch in self._forecast.watch(self._epoch.watch(batches)):
            if self._forecast.is_first_known:
                self.say(line("speed", "; ".join(filter(None, [str(self._forecast.speed), self._time_left()]))))
            with self._watching_norms(epoch):
                yield batch

    def image(self, name: str, rgb: np.ndarray) -> None:
        """Write (H, W, 3) uint8 as NAME.png on rank 0, and tell of it with the next record."""
        if not ranks.is_rank_zero():
            return
        self._images[name] = rgb
        with warn_on_disk_error(self.folder / f"{name}.png"):
            write_png(self.folder / f"{name}.png", rgb)

    def losses(self, step: int, terms: Tensor, *, lr: float, epoch: int) -> None:
        """Tell of optimizer step number `step` (from 1), in epoch `epoch` (from 0): its (3,) losses, per image."""
        self.step = step
        self._epoch.add(terms)
        losses, speed = named(terms), self._epoch.throughput
        scalars = {f"train/{name}": value for name, value in (*losses.items(), ("lr", lr))}
        if speed.steps:
            scalars["speed/images_per_s"] = speed.images_per_s
            scalars["speed/share_waiting_for_data"] = speed.share_waiting
        of_epochs = f"/{self.length.epochs}" if self.length else ""
        parts = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        words = f"epoch {epoch + 1}{of_epochs}, {parts}, {speed}"
        self._listeners.tell("step", self._record(epoch, scalars, words=words))

    def evaluating(self) -> AbstractContextManager[None]:
        """Return the context of an evaluation, which is timed."""
        return self._forecast.evaluation()

    def end_epoch(self, epoch: int, *, lr: float, table: CocoTable | DomainTable | None) -> None:
        """Tell of an epoch (from 0), and of its evaluation if there was one."""
        row = {"lr": lr, **self._epoch.take()}
        if table is not None:
            APs, norms = {"AP": table.AP, "AP50": table.AP50}, self._norm_health.layers()
            scalars = {f"val/{name}": value for name, value in APs.items()} | summary(norms)
            words = "; ".join(filter(None, [table.words(), self._time_left()]))
            self._listeners.tell("evaluation", self._record(epoch, scalars, norms=norms, words=words))
            row |= APs
        self._listeners.tell("epoch", self._record(epoch, row))

    def end(self, error: BaseException | None = None) -> None:
        """Tell that the training has ended, or failed."""
        if error is None:
            self._listeners.tell("end")
        else:
            self._listeners.tell("error", error)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses and seconds of the unfinished epoch."""
        return self._epoch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch.load_state_dict(state)

    def _record(self, epoch: int, scalars: Mapping[str, float], **more: Any) -> Record:
        images, self._images = self._images, {}
        return Record(step=self.step, epoch=epoch + 1, scalars=scalars, images=images, **more)

    def _time_left(self) -> str:
        return self._forecast.words(self.length, self.step) if self.length else ""

    def _watching_norms(self, epoch: int) -> AbstractContextManager[None]:
        """Watch the norms in the last step before an evaluation. Rank 0 sees enough for all."""
        if self.length is None or not ranks.is_rank_zero():
            return nullcontext()
        last_step = min((epoch + 1) * self.length.epoch_steps, self.length.total_steps)
        is_last = self.step + 1 == last_step and self.length.is_evaluation_due(epoch)
        return self._norm_health.watching() if is_last else nullcontext()
