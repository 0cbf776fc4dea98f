"""Training time: which mini-batch of which optimizer step a forward belongs to.

The trainer announces it, and modules never count: one that counts its own forwards, or reads a clock, changes its
results under one extra forward and under activation checkpointing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Mini-batch `index` of the `count` mini-batches that make up optimizer step `step` (all from 0)."""

    step: int
    index: int
    count: int


class BatchAware(ABC):
    """Interface of modules that depend on the mini-batch and the optimizer step of a forward."""

    @abstractmethod
    def announce(self, tick: Tick) -> None:
        """Receive the tick of all forwards until the next announcement."""

    @abstractmethod
    def batch_ended(self) -> None:
        """Run after forward and backward of all mini-batches, before the optimizer steps."""

    def loss_rescaled(self, factor: float) -> None:  # noqa: B027  most store no gradients
        """Multiply stored gradients by `factor`, when training resumes with another loss scale.

        Changes of the float16 loss scale by 2 are not announced: an average of gradients soon forgets them.
        """


class BatchClock:
    """The only counter of optimizer steps; learning rate, burn-in, logging and checkpoints read `step`.

    Create it after every module conversion and before any wrapper (DDP, compile): modules that are replaced later do
    not receive announcements, nor do modules in eval mode.
    """

    def __init__(self, model: nn.Module, *, step: int = 0) -> None:
        self.step = step
        self._listeners = [module for module in model.modules() if isinstance(module, BatchAware)]

    def minibatches(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Announce and yield each mini-batch.

        A loop that is left early (an error, a break) never announces the end of its batch, so an incomplete batch
        leaves no trace in running statistics.
        """
        parts = tuple(parts)
        for index, part in enumerate(parts):
            tick = Tick(step=self.step, index=index, count=len(parts))
            for listener in self._listeners:
                if listener.training:
                    listener.announce(tick)
            yield part
        for listener in self._listeners:
            if listener.training:
                listener.batch_ended()

    def stepped(self) -> None:
        """Count an optimizer step (with fp16 also one that the gradient scaler skipped)."""
        self.step += 1
