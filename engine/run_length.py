"""The length of a training in steps and epochs, and which of its epochs end with an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLength:
    """total_steps optimizer steps, in epochs of epoch_steps of which the end may cut the last one short."""

    total_steps: int
    epoch_steps: int
    evals: int  # as typed: there are no more evaluations than epochs

    @property
    def epochs(self) -> int:
        return -(-self.total_steps // self.epoch_steps)

    def is_evaluation_due(self, epoch: int) -> bool:
        """Return whether to evaluate after this epoch, counted from 0."""
        return self.evaluations(epoch + 1) > self.evaluations(epoch)

    def evaluations(self, epochs: int) -> int:
        """Return the number of evaluations in the first `epochs` epochs.

        The first one comes after about a twentieth of the training, to show early whether it learns; the others are
        spread evenly over the rest. The last epoch always has one, and with evals=1 the only one.
        """
        last = self.epochs
        evals = min(self.evals, last)
        first = last if evals == 1 else max(1, min(last // 20, last // evals))
        if epochs < first:
            return 0
        return 1 + (epochs - first) * (evals - 1) // max(1, last - first)

    def next_evaluation(self, step: int) -> int:
        """Return the step that the next evaluation follows, after `step` of them and what was due then."""
        epoch = step // self.epoch_steps
        while epoch + 1 < self.epochs and not self.is_evaluation_due(epoch):
            epoch += 1
        return min((epoch + 1) * self.epoch_steps, self.total_steps)

    def seconds_left(self, step: int, epochs_done: int, *, step_s: float, evaluation_s: float) -> float:
        """Return the time for the steps after `step`, and the evaluations after so many epochs."""
        evaluations = self.evaluations(self.epochs) - self.evaluations(epochs_done)
        return (self.total_steps - step) * step_s + evaluations * evaluation_s
