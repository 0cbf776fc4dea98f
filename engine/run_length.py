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
