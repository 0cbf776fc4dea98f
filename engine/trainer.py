"""The parts of one training: built from a Job, saved together, and restored together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from engine import build
from engine.ema import ModelEMA
from engine.job import Job
from engine.loss_watch import LossWatch
from engine.profiling import profiled
from engine.runlog import RunLog
from engine.training_state import restore, training_state
from evaluation.coco_map import CocoTable
from evaluation.evaluator import Evaluator
from models.detector import Detector, make_checkpoint
from models.freeze import freeze
from models.network import Network
from models.norms.effective_batch import check_values
from models.norms.freeze_stats import StatisticsFreeze
from models.weights.start import start_from
from models.yolo.postprocess import DetectionOptions
from utils import ranks
from utils.checkpoint import Checkpoint, ResumeState
from utils.console import warn
from utils.draw import draw_batch
from utils.environment import describe, leave_a_core_to_loaders, pick_device
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
        self.device = ranks.local_device(pick_device(options.device))
        leave_a_core_to_loaders(self.device, options.workers)
        seed_everything(options.seed)
        self.network = build.make_network(options, plan, self.device)
        self.layers_frozen = freeze(self.network, options.optim.freeze) if options.optim.freeze else ""
        self.weights_loaded = ""
        if options.weights is not None and job.checkpoint is None:
            self.weights_loaded = start_from(options.weights, options.cfg, self.network, job.train_set.class_names)
        self.loader = build.make_loader(options, plan, job.train_set)
        check_values(plan.with_input_hw(self.loader.smallest_hw), options.norm, mini_batch=job.mini_batch)
        optim = options.optim
        self.total_steps = optim.epochs * len(self.loader) if optim.epochs else optim.max_steps
        self.epochs = -(-self.total_steps // len(self.loader))
        self.loader.close_mosaic(round((1 - options.augment.close_mosaic) * self.total_steps))
        self.schedule = build.make_schedule(options, plan, total_steps=self.total_steps)
        decay = self.schedule.average_decay() if optim.ema_decay is None else optim.ema_decay
        self.ema = ModelEMA(self.network, decay=decay)
        self.evaluator = make_val_evaluator(job, self.ema.model, stop)
        self.norm_freeze = StatisticsFreeze(self.network, options.norm, self.total_steps)
        first_step, self.epochs_done = place_of(
            job.checkpoint, images=len(job.train_set), epoch_steps=len(self.loader), total_steps=self.total_steps
        )
        self.log = RunLog(
            folder,
            total_steps=self.total_steps,
            first_step=first_step,
            epochs_done=self.epochs_done,
            save_every_s=60 * options.save_minutes,
        )
        if options.speed.compile:
            build.compile_for_all_sizes(self.network)
        self.step = build.make_step(options, self.network, ranks.data_parallel(self.network), self.log.say)
        self.loss_watch = LossWatch()
        self.best_ap = float("-inf")
        self._saved_step: int | None = None
        if job.checkpoint is not None:
            self._resume(job.checkpoint)
        self.log.settings(self._resolved_settings())

    @property
    def steps_done(self) -> int:
        return self.step.clock.step

    @property
    def is_saved(self) -> bool:
        """True if last.pt holds all that was trained."""
        return self._saved_step == self.steps_done

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of the epoch that were not trained on yet, on the device."""
        self.network.train()
        self.loader.set_epoch(epoch, self.steps_done - epoch * len(self.loader))
        batches: Iterator[Batch] = islice(self.loader, self.total_steps - self.steps_done)
        if self.job.options.speed.profile and epoch == self.epochs_done and ranks.is_rank_zero():
            batches = profiled(batches, self.folder / "profile.json", say=self.log.say)
        for batch in self.log.watch(batches):
            if self.steps_done == 0:
                self.log.image("first_batch", draw_batch(batch, self.job.train_set.class_names))
            yield batch.to(self.device, non_blocking=True)

    def is_evaluation_due(self, epoch: int) -> bool:
        """Return whether to evaluate after this epoch: after about `--evals` of the epochs, and after the last."""
        evals, last = self.job.options.evals, self.epochs
        return epoch + 1 == last or (epoch + 1) * evals // last > epoch * evals // last

    def evaluate(self) -> CocoTable:
        """Measure the EMA weights on the validation split, and draw what they find in its first images."""
        self.save_last()  # an evaluation can take long, and run out of memory
        self.step.optimizer.zero_grad(set_to_none=True)  # it needs the memory more than the old gradients do
        self.ema.agree()
        return self.evaluator.measure(show=lambda rgb: self.log.image("predictions", rgb, self.steps_done))

    def save_if_due_or_stop(self) -> None:
        """After a step: write last.pt if it is time to. Raises Stopped if a stop was requested on any rank."""
        is_stopped, is_save_due = ranks.any_rank(self.stop.requested, self.log.is_save_due())
        if is_stopped:
            raise Stopped
        if is_save_due:
            self.save_last()

    def end_epoch(self, epoch: int, table: CocoTable | None) -> None:
        """Log the epoch and save what it reached. table: of its evaluation, if there was one."""
        row = {"step": self.steps_done, "epoch": epoch + 1, "lr": self.schedule.rate(self.steps_done - 1)}
        if table is not None:
            row |= {"AP": table.AP, "AP50": table.AP50}
            self.log.say(f"epoch {epoch + 1}: AP {table.AP:.3f}  AP50 {table.AP50:.3f}")
        self.log.end_epoch(row)
        self.epochs_done = epoch + 1
        if table is not None and self.best_ap <= table.AP:  # of equal ones the later, which was trained longer
            self.save_best(table.AP)
        (is_save_due,) = ranks.any_rank(self.log.is_save_due(at_epoch_end=True))
        if table is not None or is_save_due:
            self.save_last()

    def ensure_best(self) -> None:
        """Make a best.pt if there is none: the run was resumed after its last epoch, or the disk was full."""
        (is_missing,) = ranks.any_rank(self.best_ap == float("-inf"))
        if is_missing:
            self.ema.agree()
            self.save_best(self.evaluator.measure().AP)
            self.save_last()

    def save_best(self, ap: float) -> None:
        """Write the EMA weights as best.pt; if that fails, they do not count as the best."""
        before, self.best_ap = self.best_ap, ap
        if not self.log.save("best.pt", self._checkpoint()):
            self.best_ap = before

    def save_last(self) -> bool:
        """Write last.pt, from which training resumes as if it had never stopped. Between batches, by all ranks."""
        training = ResumeState(
            state=training_state(self.step, self.ema),
            log={**self.log.state_dict(), "loss_watch": self.loss_watch.state_dict()},
            subdivisions=self.step.recovery.subdivisions,
        )
        is_written = self.log.save("last.pt", replace(self._checkpoint(), training=training))
        self._saved_step = self.steps_done if is_written else None
        return is_written

    def _resolved_settings(self) -> dict[str, Any]:
        """Return all settings, with those that were left to the cfg or to this machine filled in."""
        return {
            **flatten(self.job.options),
            "cfg": self.job.plan.path,
            "image_size": self.job.plan.net.input_hw,
            "amp": self.step.precision.kind,
            "burn_in_steps": self.schedule.burn_in_steps,
            "lr_steps": self.schedule.steps,
            "ema_decay": self.ema.decay,
            "total_steps": self.total_steps,
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
            mini_batch=self.job.mini_batch,
            settings=flatten(options),
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.training is not None
        restore(self.step, self.ema, checkpoint.training.state, checkpoint.weights)
        self.log.load_state_dict(checkpoint.training.log)
        if "loss_watch" in checkpoint.training.log:  # not in earlier checkpoints
            self.loss_watch.load_state_dict(checkpoint.training.log["loss_watch"])
        best = self.folder / "best.pt"
        if ranks.broadcast(best.exists()):
            self.best_ap = checkpoint.best_ap
        elif checkpoint.best_ap > self.best_ap:
            warn(f"{best} does not exist: the next evaluation writes one, whatever the best AP was before")


def make_val_evaluator(job: Job, network: Network, stop: Stop | None) -> Evaluator:
    """Return the evaluator of a network on the job's validation split. Raises Stopped between batches on request."""
    letterbox, names = job.options.augment.letterbox, job.train_set.class_names
    return Evaluator(
        Detector(network=network, class_names=names, letterbox=letterbox, options=DetectionOptions()),
        job.val_set,
        batch_size=job.mini_batch,  # what fits in training fits here
        workers=job.options.workers,
        backend=job.options.eval_backend,
        stop=stop,
    )


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
