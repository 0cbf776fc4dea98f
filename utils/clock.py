"""Time, as the trainer tells it.

The trainer announces; modules never count. A module that counts its own forwards, or reads a clock, changes
its results under one stray forward and under activation checkpointing.
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
    """A module that wants to hear which mini-batch of which batch the next forward belongs to."""

    @abstractmethod
    def announce(self, tick: Tick) -> None:
        """The forwards that follow belong to `tick`, until the next announcement."""

    @abstractmethod
    def batch_ended(self) -> None:
        """The forwards and backwards of all mini-batches are done; the optimizer has not stepped yet."""

    def loss_rescaled(self, factor: float) -> None:  # noqa: B027  most remember no gradients
        """Where training goes on with another loss scale: what is remembered of gradients becomes as many times larger.

        Not told of float16's own changes of its scale, by 2, whose traces an average of gradients soon loses.
        """


class BatchClock:
    """The only counter there is: learning rate, burn-in, logging and checkpoints read `step`.

    Build it after every module conversion and before any wrapper (DDP, compile): modules that replace others
    later are not heard of.

    A module in eval mode is told nothing: it neither looks at mini-batches nor remembers them.
    """

    def __init__(self, model: nn.Module, *, step: int = 0) -> None:
        self.step = step
        self._listeners = [module for module in model.modules() if isinstance(module, BatchAware)]

    def minibatches(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Announce each mini-batch before handing it out.

        A loop that is left early (an error, a break) never announces the end of its batch, so a half-seen
        batch leaves no trace in running statistics.
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
        """The optimizer has updated the weights."""
        self.step += 1
