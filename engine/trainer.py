"""The parts of one training: built from a Job, saved together, and restored together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from engine import build
from engine.checkpoint_saver import CheckpointSaver
from engine.ema import ModelEMA
from engine.events import Listener, Run
from engine.job import Job
from engine.loss_watch import LossWatch
from engine.patience import Patience
from engine.profiling import profiled
from engine.recipe import planned_steps
from engine.run_length import RunLength
from engine.time_budget import TimeBudget
from engine.training_log import TrainingLog
from engine.training_state import restore, training_state
from evaluation.coco_map import CocoTable
from evaluation.domains import DomainEvaluator, DomainTable
from evaluation.evaluator import Evaluator
from models.detector import Detector
from models.freeze import freeze
from models.network import Network
from models.norms.effective_batch import burn_in_warnings, check_values
from models.norms.freeze_stats import StatisticsFreeze
from models.predictor import TorchPredictor
from models.stored_network import make_checkpoint
from models.weights.start import start_from
from models.yolo.postprocess import DetectionOptions
from utils import ranks
from utils.atomic_file import warn_on_disk_error, write_text
from utils.checkpoint import Checkpoint, ResumeState
from utils.console import line, warn
from utils.draw import draw_batch
from utils.environment import describe, leave_a_core_to_loaders, pick_device
from utils.errors import UserError
from utils.flags import flatten
from utils.seed import seed_everything
from utils.stop import Stop, Stopped
from utils.structures import Batch


class Trainer:
    """Network, optimizer, loader and the other parts of one training, at the step of the job's checkpoint.

    weights_loaded, layers_frozen: what `--weights` and `--freeze` did, in words; "" for nothing.
    """

    def __init__(self, job: Job, folder: Path, stop: Stop) -> None:
        self.job, self.folder, self.stop = job, folder, stop
        options, plan = job.options, job.plan
        self.time_budget = make_time_budget(job)  # its clock starts here
        self.device = ranks.local_device(pick_device(options.device))
        leave_a_core_to_loaders(self.device, options.workers)
        seed_everything(options.seed)
        self.network = build.make_network(options, plan, self.device)
        self.layers_frozen = freeze(self.network, options.optim.freeze) if options.optim.freeze else ""
        self.weights_loaded = ""
        if options.weights is not None and job.checkpoint is None:
            self.weights_loaded = start_from(
                options.weights,
                options.cfg,
                self.network,
                job.train_set.class_names,
                [domain.name for domain in job.domains],
            )
        self.loader = build.make_loader(options, plan, job.train_set)
        fewest = 1 if build.splits_by_domain(options) else job.mini_batch
        check_values(plan.with_input_hw(self.loader.smallest_hw), options.norm, mini_batch=fewest)
        optim = options.optim
        total_steps = planned_steps(optim, len(job.train_set))
        if self.time_budget is not None:  # before its first fit there is at least more to train
            total_steps = self.time_budget.total_steps or total_steps + (job.checkpoint.step if job.checkpoint else 0)
        self.length = RunLength(total_steps=total_steps, epoch_steps=len(self.loader), evals=options.evals)
        self.close_mosaic()
        self.schedule = build.make_schedule(options, plan, total_steps=total_steps)
        self.ema = ModelEMA(self.network, decay=optim.ema_decay)
        self.evaluator = make_val_evaluator(job, self.ema.model, stop)
        self.norm_freeze = StatisticsFreeze(self.network, options.norm, total_steps)
        first_step, self.epochs_done = place_of(
            job.checkpoint, images=len(job.train_set), epoch_steps=len(self.loader), total_steps=total_steps
        )
        if ranks.is_rank_zero():
            folder.mkdir(parents=True, exist_ok=True)
        self.saver = CheckpointSaver(folder, every_s=60 * options.save_minutes)
        self.log = TrainingLog(
            folder,
            self.network,
            length=self.length if self.is_length_known else None,
            step=first_step,
            evaluation_batches=len(job.val_set) / optim.batch_size,
        )
        if options.speed.compile:
            build.compile_for_all_sizes(self.network)
        self.step = build.make_step(options, self.network, build.make_forward(options, self.network), self.log.say)
        self.loss_watch = LossWatch(self.step.remedies)
        self.patience = Patience(options.patience)
        self.best_ap = float("-inf")
        self.run_id = (job.checkpoint and job.checkpoint.run_id) or uuid4().hex
        self._saved_step: int | None = None
        if job.checkpoint is not None:
            self._resume(job.checkpoint)
        self._write_settings()

    @property
    def steps_done(self) -> int:
        return self.step.clock.step

    @property
    def is_saved(self) -> bool:
        """True if last.pt holds all that was trained."""
        return self._saved_step == self.steps_done

    def settle_rate(self, rate: float) -> None:
        """Train with this rate from here on, in place of `--learning-rate auto`, and save that."""
        optim = replace(self.job.options.optim, learning_rate=rate)
        self.job = replace(self.job, options=replace(self.job.options, optim=optim))
        self.schedule = replace(self.schedule, base_rate=rate)
        self._write_settings()
        self.save_last()

    def begin(self, listeners: Sequence[Listener]) -> None:
        """Tell `listeners`, and those that the job names, that the training begins or goes on."""
        run = Run(
            folder=self.folder,
            run_id=self.run_id,
            settings=self._resolved_settings(),
            step=self.steps_done,
            epochs_done=self.epochs_done,
        )
        self.log.begin(run, loggers=self.job.options.logger, listeners=listeners)

    def close_mosaic(self) -> None:
        """End mosaic, mixup and cutmix in the last part of the training, as `--close-mosaic` has it."""
        self.loader.close_mosaic(round((1 - self.job.options.augment.close_mosaic) * self.length.total_steps))

    @property
    def is_length_known(self) -> bool:
        """False before the first fit of a time budget: the length is then that of a run without one."""
        return self.time_budget is None or self.time_budget.total_steps is not None

    @property
    def is_over(self) -> bool:
        """True after the last epoch, which `--patience` may make an earlier one."""
        return self.epochs_done >= self.length.epochs or self.patience.is_exhausted

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of the epoch that were not trained on yet, on the device."""
        self.network.train()
        self.loader.set_epoch(epoch, self.steps_done - epoch * len(self.loader))
        batches = self._batches_to_the_end()
        if self.job.options.speed.profile and epoch == self.epochs_done and ranks.is_rank_zero():
            batches = profiled(batches, self.folder / "profile.json", say=self.log.say)
        for batch in self.log.watch(batches, epoch):
            if self.steps_done == 0:
                self.log.image("first_batch", draw_batch(batch, self.job.train_set.class_names))
            yield batch.to(self.device, non_blocking=True)

    def _batches_to_the_end(self) -> Iterator[Batch]:
        """Yield the loader's batches up to the last step, which a time budget may move meanwhile."""
        batches = iter(self.loader)
        while self.steps_done < self.length.total_steps and (batch := next(batches, None)) is not None:
            yield batch

    def evaluate(self) -> CocoTable | DomainTable:
        """Measure the EMA weights on the validation split, and draw what they find in its first images."""
        with nullcontext() if self.time_budget is None else self.time_budget.evaluation(), self.log.evaluating():
            self.save_last()  # an evaluation can take long, and run out of memory
            self.step.optimizer.zero_grad(set_to_none=True)  # it needs the memory more than the old gradients do
            self.ema.agree()
            return self.evaluator.measure(progress=True, show=lambda rgb: self.log.image("predictions", rgb))

    def fit_to_time_budget(self) -> None:
        """After a step: take another length if `--time-budget` asks for it, with all that depends on it."""
        if self.time_budget is None or (length := self.time_budget.fit(self.length, self.steps_done)) is None:
            return
        self.length = length
        self.schedule = build.make_schedule(self.job.options, self.job.plan, total_steps=length.total_steps)
        self.norm_freeze.total_steps = length.total_steps
        self.close_mosaic()
        self.log.set_length(length)
        self._write_settings()
        self.log.say(line("schedule", self.time_budget.words(length)))
        self.log.say(line("", self.schedule.words()))
        for warning in burn_in_warnings(self.job.options.norm, self.job.plan, length.total_steps):
            self.log.say(f"warning: {warning}")

    def save_if_due_or_stop(self) -> None:
        """After a step: write last.pt if it is time to. Raises Stopped if a stop was requested on any rank."""
        is_stopped, is_save_due = ranks.any_rank(self.stop.requested, self.saver.is_due())
        if is_stopped:
            raise Stopped
        if is_save_due:
            self.save_last()

    def end_epoch(self, epoch: int, table: CocoTable | DomainTable | None) -> None:
        """Log the epoch and save what it reached. table: of its evaluation, if there was one."""
        self.log.end_epoch(epoch, lr=self.schedule.rate(self.steps_done - 1), table=table)
        if table is not None:
            self.patience(table.AP)
            if self.patience.is_exhausted and epoch + 1 < self.length.epochs:
                self.log.say(f"epoch {epoch + 1}: {self.patience.words()}")
        self.epochs_done = epoch + 1
        if table is not None and self.best_ap <= table.AP:  # of equal ones the later, which was trained longer
            self.save_best(table.AP)
        (is_save_due,) = ranks.any_rank(self.saver.is_due(at_epoch_end=True))
        if table is not None or is_save_due:
            self.save_last()

    def ensure_best(self) -> None:
        """Make a best.pt if there is none: the run was resumed after its last epoch, or the disk was full."""
        (is_missing,) = ranks.any_rank(self.best_ap == float("-inf"))
        if is_missing:
            self.ema.agree()
            self.save_best(self.evaluator.measure().AP)
            self.save_last()

    def require_saved(self) -> None:
        """At the end: raise UserError, on all ranks, if a checkpoint could not be written the last time."""
        if ranks.broadcast(self.saver.failures.failing):
            raise UserError(ranks.broadcast(self.saver.failures.words()))

    def save_best(self, ap: float) -> None:
        """Write the EMA weights as best.pt; if that fails, they do not count as the best."""
        before, self.best_ap = self.best_ap, ap
        if not self.saver.save("best.pt", self._checkpoint()):
            self.best_ap = before

    def save_last(self) -> bool:
        """Write last.pt, from which training resumes as if it had never stopped. Between batches, by all ranks."""
        training = ResumeState(
            state=training_state(self.step, self.ema),
            log={
                **self.log.state_dict(),
                "loss_watch": self.loss_watch.state_dict(),
                "patience": self.patience.state_dict(),
                "time_budget": None if self.time_budget is None else self.time_budget.state_dict(),
            },
            subdivisions=self.step.recovery.subdivisions,
        )
        # All ranks know, or one alone would save again at a stop, and wait for the others.
        is_written = self.saver.save("last.pt", replace(self._checkpoint(), training=training))
        is_written = not any(ranks.any_rank(not is_written))
        self._saved_step = self.steps_done if is_written else None
        return is_written

    def _write_settings(self) -> None:
        path = self.folder / "settings.json"
        if ranks.is_rank_zero():
            with warn_on_disk_error(path):
                write_text(path, json.dumps(self._resolved_settings(), indent=2) + "\n")

    def _resolved_settings(self) -> dict[str, Any]:
        """Return all settings, with those that were left to the cfg or to this machine filled in."""
        return {
            **flatten(self.job.options),
            "cfg": self.job.plan.path,
            "image_size": self.job.plan.net.input_hw,
            "burn_in_steps": self.schedule.burn_in_steps,
            "lr_steps": self.schedule.steps,
            "ema_decay": self.ema.decay,
            "total_steps": self.length.total_steps,
            "run_id": self.run_id,
            "environment": describe(self.device),
        }

    def _checkpoint(self) -> Checkpoint:
        options = self.job.options
        network = make_checkpoint(
            self.job.plan,
            options.norm,
            self.ema.model.state_dict(),
            class_names=self.job.train_set.class_names,
            letterbox=options.augment.letterbox,
        )
        return replace(
            network,
            step=self.steps_done,
            epochs_done=self.epochs_done,
            train_images=len(self.job.train_set),
            best_ap=self.best_ap,
            run_id=self.run_id,
            mini_batch=self.job.mini_batch,
            settings=flatten(options),
            domains=tuple(domain.name for domain in self.job.domains) if len(self.job.domains) > 1 else (),
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.training is not None
        try:
            restore(self.step, self.ema, checkpoint.training.state, checkpoint.weights)
            self.log.load_state_dict(checkpoint.training.log)
            for name, part in (("loss_watch", self.loss_watch), ("patience", self.patience)):
                if name in checkpoint.training.log:  # not in earlier checkpoints
                    part.load_state_dict(checkpoint.training.log[name])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise UserError(
                f"{self.job.options.resume}: does not hold the state of this training ({reason})"
            ) from error
        best = self.folder / "best.pt"
        if ranks.broadcast(best.exists()):
            self.best_ap = checkpoint.best_ap
        elif checkpoint.best_ap > self.best_ap:
            warn(f"{best} does not exist: the next evaluation writes one, whatever the best AP was before")


def make_val_evaluator(job: Job, network: Network, stop: Stop | None) -> Evaluator | DomainEvaluator:
    """Return the evaluator of a network on the job's validation split. Raises Stopped between batches on request."""
    letterbox, names = job.options.augment.letterbox, job.train_set.class_names
    predictor = TorchPredictor(network=network)
    detector = Detector(predictor=predictor, class_names=names, letterbox=letterbox, options=DetectionOptions())
    evaluators = {
        domain.name: Evaluator(
            detector,
            domain.val_set,
            batch_size=job.mini_batch,  # what fits in training fits here
            workers=job.options.workers,
            backend=job.options.eval_backend,
            stop=stop,
        )
        for domain in job.domains
    }
    return DomainEvaluator(evaluators) if len(evaluators) > 1 else evaluators[job.domains[0].name]


def make_time_budget(job: Job) -> TimeBudget | None:
    """Return the time budget of the job, with the state of its checkpoint; None without `--time-budget`."""
    options, saved = job.options, None
    if options.optim.time_budget is None:
        return None
    budget = TimeBudget(
        options.optim.time_budget,
        evaluation_batches=len(job.val_set) / options.optim.batch_size,
        reports=3 if options.norm.precise_bn else 2,  # it draws, too; with precise statistics it measures twice
    )
    if job.checkpoint is not None and job.checkpoint.training is not None:
        saved = job.checkpoint.training.log.get("time_budget")  # not there if it began without one
    if saved is not None:
        budget.load_state_dict(saved)
    return budget


def place_of(checkpoint: Checkpoint | None, *, images: int, epoch_steps: int, total_steps: int) -> tuple[int, int]:
    """Return the steps and epochs that are done, 0 without a checkpoint.

    A last epoch that the end of the run cut short is not done if there is more to train now. images: to train on now;
    with another number of them than before, the epochs done are those that the steps fill.
    """
    if checkpoint is None:
        return 0, 0
    step, epochs_done = checkpoint.step, checkpoint.epochs_done
    if checkpoint.train_images not in (None, images):
        epochs_done = -(-step // epoch_steps)
    return step, min(epochs_done, step // epoch_steps) if step < total_steps else epochs_done
