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
    """Mini-batch `index` of the `count` mini-batches that make up optimizer step `step` (all from 0).

    domains: of each of these mini-batches the domain of each image; () where nobody told.
    """

    step: int
    index: int
    count: int
    domains: tuple[tuple[int, ...], ...] = ()

    def of_domain(self, domain: int) -> Tick | None:
        """Return the tick of a training on this domain's images alone; None if the mini-batch has none of them."""
        having = [index for index, domains in enumerate(self.domains) if domain in domains]
        if self.index not in having:
            return None
        return Tick(step=self.step, index=having.index(self.index), count=len(having))


class BatchAware(ABC):
    """Interface of modules that depend on the mini-batch and the optimizer step of a forward."""

    training: bool

    @property
    def is_listening(self) -> bool:
        """Whether it is told: in training mode, unless a subclass says otherwise."""
        return self.training

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


def listeners_of(model: nn.Module) -> list[BatchAware]:
    """Return the modules to be told; not the parts of another one, which hear what that one tells them."""
    found = [module for module in model.modules() if isinstance(module, BatchAware)]
    parts = {part for module in found for part in module.modules() if part is not module}
    return [module for module in found if module not in parts]


def announce_to(listeners: Iterable[BatchAware], tick: Tick) -> None:
    """Tell those that are listening which mini-batch comes next."""
    for listener in listeners:
        if listener.is_listening:
            listener.announce(tick)


def end_batch_of(listeners: Iterable[BatchAware]) -> None:
    """Tell those that are listening that the batch has ended."""
    for listener in listeners:
        if listener.is_listening:
            listener.batch_ended()


class BatchClock:
    """The only counter of optimizer steps; learning rate, burn-in, logging and checkpoints read `step`.

    Create it after every module conversion and before any wrapper (DDP, compile): modules that are replaced later do
    not receive announcements, nor do modules in eval mode.
    """

    def __init__(self, model: nn.Module, *, step: int = 0) -> None:
        self.step = step
        self._listeners = listeners_of(model)

    def minibatches(self, parts: Iterable[Part], domains: Iterable[tuple[int, ...]] = ()) -> Iterator[Part]:
        """Announce and yield each mini-batch. domains: of each mini-batch the domain of each image.

        A loop that is left early (an error, a break) never announces the end of its batch, so an incomplete batch
        leaves no trace in running statistics.
        """
        parts, domains = tuple(parts), tuple(domains)
        for index, part in enumerate(parts):
            announce_to(self._listeners, Tick(step=self.step, index=index, count=len(parts), domains=domains))
            yield part
        end_batch_of(self._listeners)

    def stepped(self) -> None:
        """Count an optimizer step (with fp16 also one that the gradient scaler skipped)."""
        self.step += 1
