"""Recovery from running out of memory: the same batch again, cut into smaller mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from utils import ranks
from utils.console import counted
from utils.errors import UserError
from utils.memory import empty_cache, host_memory_like, is_out_of_memory
from utils.seed import random_state, set_random_state

REMEDIES = (
    "set --checkpoint-activations, on a GPU --offload-activations or --amp bf16, or in a new run a smaller --image-size"
)


class OutOfMemoryRecovery:
    """Repeat forward and backward of a batch, with more `subdivisions` each time, until they fit into memory.

        for attempt in recovery.attempts(len(batch)):
            with attempt:
                ...  # zero_grad, then forward and backward of `recovery.subdivisions` mini-batches

    The subdivisions that fit are kept for the next batch. An attempt that fails leaves no trace in buffers and random
    state, so the batch ends as if it had been cut so finely from the start. When one rank runs out of memory, all of
    them repeat the batch. communicates: whether ranks exchange something in the forward; the others would wait for what
    does not come, so that no second attempt is possible. say: prints a line for the user.
    """

    def __init__(
        self, network: nn.Module, *, subdivisions: int, communicates: bool, say: Callable[[str], None]
    ) -> None:
        self.subdivisions = subdivisions
        self._communicates, self._say = communicates, say
        self._snapshot = Snapshot(network)

    def attempts(self, images: int) -> Iterator[AbstractContextManager[None]]:
        """Yield attempts until one succeeds. Raises UserError if a single image does not fit."""
        self._snapshot.take()
        while True:
            yield self._attempt()
            has_lost_others = self._ran_out and self._communicates
            if not has_lost_others and not any(ranks.any_rank(self._ran_out)):
                return
            self._snapshot.restore()
            if has_lost_others:
                raise UserError(
                    f"out of memory with {-(-images // self.subdivisions)} images per forward on rank {ranks.rank()}: "
                    f"go on with --resume and --subdivisions {self._finer_cut(images)}"
                )
            self._cut_finer(images)

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Note an out-of-memory error without storing it: its traceback would keep the activations alive."""
        self._ran_out = False
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and not all libraries raise it
            if not is_out_of_memory(error):
                raise
            self._ran_out = True

    def _finer_cut(self, images: int) -> int:
        """Return the next number of subdivisions that divides the batch. Raises UserError if there is none."""
        if self.subdivisions >= images:
            raise UserError(f"out of memory with one image per forward: {REMEDIES}")
        return next(n for n in range(self.subdivisions + 1, images + 1) if images % n == 0)

    def _cut_finer(self, images: int) -> None:
        """Raise `subdivisions` to the next number that divides the batch."""
        before, finer = -(-images // self.subdivisions), self._finer_cut(images)
        self.subdivisions, now = finer, images // finer
        empty_cache()
        self._say(
            f"out of memory with {before} images per forward: going on with --subdivisions {finer}, "
            f"{counted(now, 'image')} each"
        )


class Snapshot:
    """A copy of what a forward changes: statistics and histories of norms, and the random state.

    Large buffers of a GPU, which only norms with a history have, are copied to page-locked host memory: the copy must
    not take GPU memory, and nothing waits for it.
    """

    LARGE = 1 << 16  # elements

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        now = dict(self._network.named_buffers())
        for name, buffer in now.items():
            if name not in self._kept or self._kept[name].shape != buffer.shape:
                self._kept[name] = self._allocate(buffer)
        self._kept = {name: self._kept[name] for name in now}
        here = [name for name in now if self._kept[name].device == now[name].device]
        if here:
            torch._foreach_copy_([self._kept[name] for name in here], [now[name] for name in here])
        for name in now.keys() - here:
            self._kept[name].copy_(now[name], non_blocking=True)
        self._random = random_state()

    @torch.no_grad()
    def restore(self) -> None:
        for name, buffer in self._network.named_buffers():
            buffer.resize_(self._kept[name].shape).copy_(self._kept[name])
        set_random_state(self._random)

    def _allocate(self, buffer: Tensor) -> Tensor:
        is_large = buffer.device.type == "cuda" and buffer.numel() > self.LARGE
        return host_memory_like(buffer) if is_large else torch.empty_like(buffer)
