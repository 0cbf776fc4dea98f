"""`--learning-rate auto`: a learning-rate range test before the first step of a training.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3: the rate grows from step to step, and
the loss tells which rates train.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from statistics import fmean

import numpy as np
import torch

from engine.loss_watch import TrainingLost
from engine.trainer import Trainer
from engine.training_state import restore, training_state
from evaluation.plots import plot_range_test
from utils import ranks
from utils.atomic_file import warn_on_disk_error
from utils.console import say
from utils.errors import UserError
from utils.stop import Stopped
from utils.structures import Batch

LOWEST, HIGHEST = 1e-6, 1.0
STEPS, FEWEST_STEPS, LIMIT_S = 80, 30, 60  # fewer than STEPS only if they would take longer than LIMIT_S
_WARM_UP_STEPS, _TIMED_STEPS = 1, 3  # the first step allocates and compiles
_RISEN = 3.0  # times the lowest loss so far: the curve ends
_WINDOW = 5  # steps over which the loss is smoothed
_SHARE_OF_FALL = 0.8  # that makes the valley, in which it is noise that makes one rate the lowest
_PLACE_ADAMW, _PLACE_SGD = 0.0, 0.5  # in it; AdamW's valley is longer, because the size of its steps is bounded
_LEAST_FALL = 0.1  # of the logarithm of the loss: smoothed, the noise of batches is 0.03


def find_rate(run: Trainer) -> float:
    """Return the learning rate that a range test finds, and plot the test as rate_test.png. The run is as it was.

    Call it before the first step, on all ranks. Raises Stopped on request, and UserError if no rate lowers the loss.
    """
    start = time.monotonic()
    say("rate", f"testing learning rates from {LOWEST:g} on, in up to {STEPS + 1} steps")
    with _undone(run):
        rates, losses = np.array(list(_range_test(run))).T
    curve = smoothed(losses)
    place = _PLACE_SGD if isinstance(run.step.optimizer, torch.optim.SGD) else _PLACE_ADAMW
    found = ranks.broadcast(choose_rate(rates, curve, place=place))
    took_s = time.monotonic() - start
    say("rate", f"learning rate {found:g} (range test of {len(rates)} steps, {took_s:.0f} s: rate_test.png)")
    if ranks.is_rank_zero():
        with warn_on_disk_error(run.folder / "rate_test.png"):
            plot_range_test(rates, losses, curve, found, run.folder / "rate_test.png")
    return found


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Return geometric means of the (N,) losses over a window around each step; both ends are repeated for it."""
    padded = np.pad(np.log(losses), _WINDOW // 2, mode="edge")
    return np.exp(np.convolve(padded, np.full(_WINDOW, 1 / _WINDOW), "valid"))


def choose_rate(rates: np.ndarray, curve: np.ndarray, *, place: float) -> float:
    """Return a rate of the valley of the (N,) smoothed losses: its first at place 0, its last at 1, on a log scale.

    In the valley the logarithm of the loss has done most of its fall. Raises UserError if it does not fall.
    """
    levels = np.log(curve)
    lowest = int(levels.argmin())
    fall = levels[:_WINDOW].mean() - levels[lowest]
    if lowest < _WINDOW or fall < _LEAST_FALL:
        raise UserError(
            f"--learning-rate auto: no rate up to {rates[-1]:.2g} lowers the loss; leave it out, or type a number"
        )
    valley = rates[levels <= levels[lowest] + (1 - _SHARE_OF_FALL) * fall]
    return float(f"{valley[0] * (valley[-1] / valley[0]) ** place:.2g}")


def _range_test(run: Trainer) -> Iterator[tuple[float, float]]:
    """Train with growing rates; yield each and the loss, until it has clearly risen or is not finite any more.

    The loss is divided by 1 + objects in an image: most of it is a sum over objects, and batches have more and fewer.
    A norm that begins as plain batch norm is tested as it is afterwards, unless the training is over before.
    """
    burn_in = max(spec.burn_in for spec in run.job.options.norm.specs(run.job.plan))
    run.step.clock.step = burn_in if burn_in < run.length.total_steps else 0
    run.network.train()
    run.norm_freeze.set_mode(0)
    rate, lowest, steps, start = LOWEST, float("inf"), STEPS, 0.0
    for number, batch in enumerate(_batches(run)):
        if number == _WARM_UP_STEPS:
            start = time.monotonic()
        if number == _WARM_UP_STEPS + _TIMED_STEPS:
            pace_s = ranks.broadcast(time.monotonic() - start) / _TIMED_STEPS
            steps = min(STEPS, max(FEWEST_STEPS, int(LIMIT_S / pace_s)))
        run.step.set_rate(rate)
        objects = len(batch.targets) / len(batch)
        try:
            loss = float(run.step(batch).sum()) / (1 + fmean(ranks.all_gather(objects)))
        except TrainingLost:
            if number == 0:
                raise  # not the rate's fault
            return
        (is_stopped,) = ranks.any_rank(run.stop.requested)
        if is_stopped:
            raise Stopped
        yield rate, loss
        lowest = min(lowest, loss)
        if loss > _RISEN * lowest or rate >= HIGHEST:
            return
        rate *= (HIGHEST / LOWEST) ** (1 / steps)


def _batches(run: Trainer) -> Iterator[Batch]:
    """Yield the training's batches from the first one on, epoch after epoch."""
    for epoch in count():
        run.loader.set_epoch(epoch)
        for batch in run.loader:
            yield batch.to(run.device, non_blocking=True)


@contextmanager
def _undone(run: Trainer) -> Iterator[None]:
    """Undo to the bit, afterwards, what training changes, as `--resume` would; without use of GPU memory."""
    saved, subdivisions = io.BytesIO(), run.step.recovery.subdivisions
    torch.save(training_state(run.step, run.ema), saved)
    run.loader.close_mosaic(math.inf)  # the test may be longer than the training
    try:
        yield
    finally:
        run.step.optimizer.zero_grad(set_to_none=True)
        saved.seek(0)
        state = torch.load(saved, map_location="cpu", weights_only=True)
        restore(run.step, run.ema, state, run.ema.model.state_dict())
        run.step.recovery.subdivisions = subdivisions
        run.close_mosaic()
