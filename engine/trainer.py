"""The parts of one training: built from a Job, saved together, and put back together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from data.loader import InputSizes, make_train_loader
from engine.amp import MixedPrecision
from engine.ema import WeightAverage
from engine.job import Job, make_detector, make_schedule
from engine.profiling import profiled
from engine.runlog import RunLog
from engine.step import TrainStep
from engine.training_state import TrainingState
from evaluation.build import make_evaluator
from models.detector import describe_network
from models.freeze import freeze
from models.network import Network, parameter_groups
from models.norms.effective_batch import check_values
from models.norms.freeze_stats import StatisticsFreeze
from models.norms.table import norm_factory
from models.weights.start import start_from
from models.yolo.criterion import make_criterion
from utils import ranks
from utils.clock import BatchClock
from utils.environment import describe, leave_a_core_to_loaders, pick_device
from utils.flags import flatten
from utils.seed import seed_everything
from utils.stop import Stop
from utils.structures import Batch


def say(line: str) -> None:
    """Once, of several ranks."""
    if ranks.is_rank_zero():
        print(line)


def make_network(job: Job, device: torch.device) -> Network:
    """In training mode, with random weights; the layers of --freeze are frozen already."""
    options = job.options
    network = Network(job.plan, norm_factory(options.norm)).to(device)
    if options.speed.checkpoint_activations:
        network.recompute_activations()
    if options.speed.channels_last:
        network.to(memory_format=torch.channels_last)
    if options.optim.freeze:
        say(freeze(network, options.optim.freeze))
    return network


def make_optimizer(job: Job, network: Network) -> torch.optim.Optimizer:
    optim = job.options.optim
    groups = parameter_groups(network, weight_decay=optim.weight_decay, backbone_rate=optim.backbone_rate)
    return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum)


def compile_for_all_sizes(network: Network) -> None:
    """Once for each input size and kind of mini-batch, of which multi-scale makes more than torch's limit of 8."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    network.compile(dynamic=False)


def place_of(checkpoint: dict[str, Any], *, images: int, epoch_steps: int, total_steps: int) -> tuple[int, int]:
    """Steps and epochs that are done. A last epoch that the run's end cut short is not, where there is more now.

    images: to train on now. Those of another number have other epochs, of which as many are done as the steps fill.
    """
    step, epochs_done = checkpoint["step"], checkpoint["epochs_done"]
    if checkpoint.get("train_images", images) != images:
        epochs_done = -(-step // epoch_steps)
    return step, min(epochs_done, step // epoch_steps) if step < total_steps else epochs_done


class Trainer:
    """Network, optimizer, loader and the rest, as the job's settings want them, at the step of its checkpoint."""

    def __init__(self, job: Job, stop: Stop) -> None:
        options, optim, plan = job.options, job.options.optim, job.plan
        self.job, self.device = job, ranks.local_device(pick_device(options.device))
        leave_a_core_to_loaders(self.device, options.workers)
        seed_everything(options.seed)
        self.network = make_network(job, self.device)
        if options.weights is not None and job.checkpoint is None:
            say(start_from(options.weights, options.cfg, self.network, job.train_set.class_names))
        self.optimizer = make_optimizer(job, self.network)
        self.loader = make_train_loader(
            job.train_set,
            InputSizes(plan.net.input_hw, options.multi_scale, plan.size_step_px),
            batch_size=optim.batch_size,
            augment=options.augment,
            seed=options.seed,
            workers=options.workers,
            cache=options.cache,
            rank=ranks.rank(),
            ranks=ranks.world_size(),
        )
        check_values(plan.with_input_hw(self.loader.smallest_hw), options.norm, mini_batch=job.mini_batch)
        self.total_steps = optim.epochs * len(self.loader) if optim.epochs else optim.max_steps
        self.epochs = -(-self.total_steps // len(self.loader))
        self.schedule = make_schedule(options, plan, total_steps=self.total_steps)
        say(f"schedule  {self.schedule.words()}")
        if (burn_in := options.norm.norm_burn_in_steps or 0) >= self.total_steps:
            say(f"warning: --norm-burn-in-steps {burn_in} is all of it: {options.norm.norm} is plain batch norm here")
        decay = self.schedule.average_decay() if optim.ema_decay is None else optim.ema_decay
        self.average = WeightAverage(self.network, decay=decay, warm_up_steps=100)
        self.evaluator = make_evaluator(
            make_detector(options, self.average.model, job.train_set.class_names),
            job.val_set,
            batch_size=job.mini_batch,  # what fits in training fits here
            workers=options.workers,
            backend=options.eval_backend,
            stop=stop,
        )
        self.regime = StatisticsFreeze(self.network, options.norm, self.total_steps)
        first_step, self.epochs_done = 0, 0
        if job.checkpoint is not None:
            lengths = {"epoch_steps": len(self.loader), "total_steps": self.total_steps}
            first_step, self.epochs_done = place_of(job.checkpoint, images=len(job.train_set), **lengths)
        self.log = RunLog(
            job.folder,
            total_steps=self.total_steps,
            first_step=first_step,
            epochs_done=self.epochs_done,
            save_every_s=60 * options.save_minutes,
        )
        if options.speed.compile:
            compile_for_all_sizes(self.network)
        self.step = TrainStep(
            network=self.network,
            forward=ranks.data_parallel(self.network),
            criterion=make_criterion(options.loss),
            optimizer=self.optimizer,
            precision=MixedPrecision(optim.amp, self.device),
            clock=BatchClock(self.network),
            subdivisions=optim.subdivisions,
            clip_norm=optim.clip_norm,
            say=self.log.say,
        )
        self.best_ap = float("-inf")
        self._kept_step: int | None = None
        if job.checkpoint is not None:
            self._go_on_from(job.checkpoint)
        resolved = {"cfg": plan.path, "image_size": plan.net.input_hw, "amp": self.step.precision.kind}
        resolved |= {"burn_in_steps": self.schedule.burn_in_steps, "lr_steps": self.schedule.steps}
        resolved |= {"ema_decay": decay, "total_steps": self.total_steps, "environment": describe(self.device)}
        self.log.settings({**flatten(options), **resolved})

    @property
    def steps_done(self) -> int:
        return self.step.clock.step

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Of one epoch, those that were not trained on yet, on the device."""
        self.network.train()
        self.loader.set_epoch(epoch, self.steps_done - epoch * len(self.loader))
        batches: Iterable[Batch] = islice(self.loader, self.total_steps - self.steps_done)
        if self.job.options.speed.profile and epoch == self.epochs_done and ranks.is_rank_zero():
            batches = profiled(batches, self.job.folder / "profile.json", say=self.log.say)
        for batch in self.log.watch(batches):
            yield batch.to(self.device, non_blocking=True)

    def is_evaluation_due(self, epoch: int) -> bool:
        """After about `--evals` of the epochs, and after the last."""
        evals, last = self.job.options.evals, self.epochs
        return epoch + 1 == last or (epoch + 1) * evals // last > epoch * evals // last

    def show_predictions(self, rgb: np.ndarray) -> None:
        """What the averaged weights find in the first images of the validation split."""
        self.log.image("predictions", rgb, self.steps_done)

    def keep_best(self, ap: float) -> None:
        """Write the averaged weights as best.pt; those that could not be written are not the best."""
        before, self.best_ap = self.best_ap, ap
        if not self.log.keep("best.pt", self._content()):
            self.best_ap = before

    def keep_last(self) -> bool:
        """Write last.pt, from which training goes on as if nothing had happened. At a batch boundary, by all ranks."""
        state = {"training": self._state().state_dict(), "log": self.log.state_dict()}
        is_written = self.log.keep("last.pt", {**self._content(), **state, "subdivisions": self.step.subdivisions})
        self._kept_step = self.steps_done if is_written else None
        return is_written

    @property
    def is_kept(self) -> bool:
        """Whether last.pt holds all that was trained."""
        return self._kept_step == self.steps_done

    def _state(self) -> TrainingState:
        return TrainingState(
            network=self.network,
            average=self.average,
            optimizer=self.optimizer,
            precision=self.step.precision,
            clock=self.step.clock,
        )

    def _content(self) -> dict[str, Any]:
        options = self.job.options
        return {
            **describe_network(self.job.plan, options.norm, self.job.train_set.class_names, options.augment.letterbox),
            "weights": self.average.model.state_dict(),
            "step": self.steps_done,
            "epochs_done": self.epochs_done,
            "train_images": len(self.job.train_set),
            "best_ap": self.best_ap,
            "mini_batch": self.job.mini_batch,
            "settings": flatten(options),
        }

    def _go_on_from(self, checkpoint: dict[str, Any]) -> None:
        self._state().load_state_dict(checkpoint["training"], weights=checkpoint["weights"])
        self.log.load_state_dict(checkpoint["log"])
        best = self.job.folder / "best.pt"
        if ranks.broadcast(best.exists()):
            self.best_ap = checkpoint["best_ap"]
        elif checkpoint["best_ap"] > self.best_ap:
            say(f"warning: {best} is not there: the next evaluation writes one, whatever the best AP was before")
