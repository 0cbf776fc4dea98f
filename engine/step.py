"""One optimizer step: from a Batch to updated weights, through whatever happens on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from engine.amp import MixedPrecision
from engine.not_finite import in_gradients, in_inputs, in_layers
from utils import ranks
from utils.clock import BatchClock
from utils.environment import cuda_is_in_use
from utils.errors import UserError
from utils.memory import empty_cache, is_out_of_memory
from utils.structures import Batch

MENDS = "set --checkpoint-activations, --amp bf16 on a GPU, or in a new run a smaller --image-size"


class NotFinite(UserError):
    """A loss or a gradient is not a number any more: a training that diverged, or bad data."""


class TrainStep:
    """Call it with a Batch whose images are on the network's device; it returns, on the host, the (3,) losses box,
    objectness, class per image.

    Every rank calls it with its own share of the batch: the gradient and the losses are those of all.

    Where a mini-batch does not fit into memory, the batch begins again with twice the subdivisions, which then stay:
    `subdivisions` says how many there are. The weights are updated as if there had been so many from the start.

    forward: the network, or what wraps it for several ranks. criterion: (heads, Targets) -> LossTerms. say: takes a
    line for the user. NotFinite, before anything is updated, where a loss or a gradient is not; UserError where a
    single image does not fit.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        forward: nn.Module,
        criterion: Callable[[Any, Any], Any],
        optimizer: torch.optim.Optimizer,
        precision: MixedPrecision,
        clock: BatchClock,
        subdivisions: int,
        clip_norm: float | None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.network, self.forward, self.criterion = network, forward, criterion
        self.optimizer, self.precision, self.clock = optimizer, precision, clock
        self.subdivisions, self.clip_norm, self.say = subdivisions, clip_norm, say
        self._undo = _Undo(network)

    def __call__(self, batch: Batch) -> Tensor:
        losses = self.gradients(batch)
        # All at once: this is where the host waits for a GPU. (With fp16 the loss scale lets it wait once more.)
        numbers = torch.cat((losses, self._gradient_norm().to(losses).view(1))).cpu()
        losses, gradient_norm = numbers[:3], numbers[3]
        self._check_finite(losses, gradient_norm, batch)
        self.precision.step(self.optimizer, self.network.parameters(), clip_norm=self.clip_norm)
        self.clock.stepped()
        return losses

    def gradients(self, batch: Batch) -> Tensor:
        """Into `grad` of the parameters, with as many subdivisions as it takes; returns the losses."""
        self._undo.keep()
        while True:
            losses = self._try_gradients(batch)
            if losses is not None:
                return ranks.all_reduce_sum(losses)
            self._undo.restore()
            self.optimizer.zero_grad(set_to_none=True)
            self._cut_finer(len(batch))

    def fits(self, batch: Batch) -> bool:
        """Whether there is memory for the batch with these subdivisions; nothing else is left of the try."""
        self._undo.keep()
        losses = self._try_gradients(batch)
        self._undo.restore()
        self.optimizer.zero_grad(set_to_none=True)
        return losses is not None

    def _try_gradients(self, batch: Batch) -> Tensor | None:
        """None where memory ran out. By then nothing that was computed is held any more: not even a traceback."""
        try:
            return self._all_minibatches(batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            return None

    def _all_minibatches(self, batch: Batch) -> Tensor:
        parts = list(batch.split(self.subdivisions))
        images = len(batch) * ranks.world_size()
        losses = torch.zeros(3, device=batch.images.device)
        for index, part in enumerate(self.clock.minibatches(parts)):
            is_last = index + 1 == len(parts)
            with nullcontext() if is_last else ranks.without_sync(self.forward):
                losses += self._minibatch(part, images)
        return losses

    def _minibatch(self, part: Batch, images: int) -> Tensor:
        with self.precision.autocast():
            heads = self.forward(part.pixels())
        loss = self.criterion(heads, part.targets)
        # Divided by the images of the whole batch: the gradient does not depend on how it was cut. Ranks average
        # their gradients, which are to be added.
        self.precision.backward(loss.total * (ranks.world_size() / images))
        return loss.detached() / images

    def _cut_finer(self, images: int) -> None:
        size = -(-images // self.subdivisions)
        if 2 * self.subdivisions > images:
            raise UserError(f"out of memory with one image per forward: {MENDS}")
        if self.forward is not self.network and ranks.world_size() > 1:
            # The other ranks wait in their backward for gradients that will not come.
            raise UserError(
                f"out of memory with {size} images per forward on rank {ranks.rank()}: go on with --resume and "
                f"--subdivisions {self._finer(images)}"
            )
        self.subdivisions = self._finer(images)
        empty_cache()
        left = images // self.subdivisions
        self.say(
            f"out of memory with {size} images per forward: going on with --subdivisions {self.subdivisions}, "
            f"{left} image{'s' * (left != 1)} each"
        )

    def _finer(self, images: int) -> int:
        """Twice as many, or the next number that divides the batch."""
        return next(n for n in range(2 * self.subdivisions, images + 1) if images % n == 0)

    def _check_finite(self, losses: Tensor, gradient_norm: Tensor, batch: Batch) -> None:
        """All ranks look for what is wrong in the same order, because a norm may ask the others in its forward."""
        if not torch.isfinite(losses).all():
            parts = list(batch.split(self.subdivisions))
            found = self._agreed_on(in_inputs(self.network, parts)) or self._agreed_on(
                in_layers(self.network, self.criterion, parts, autocast=self.precision.autocast)
            )
        elif not torch.isfinite(gradient_norm) and not self.precision.may_overflow():
            found = self._agreed_on(in_gradients(self.network))
        else:
            return
        raise NotFinite(
            f"step {self.clock.step + 1}: {found or 'the loss is not finite'} (images of this batch: "
            f"{names_of(batch.paths)}): mend those, or go on from last.pt, which holds the weights from before, with "
            "--resume and a lower --learning-rate or --clip-norm"
        )

    def _agreed_on(self, found: str) -> str:
        """What any rank has found."""
        return "; ".join(dict.fromkeys(filter(None, ranks.all_gather(found))))

    def _gradient_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])


class _Undo:
    """What a half-seen batch leaves behind, taken back: statistics and histories of norms, random numbers drawn.

    Large buffers of a GPU, which only norms with a history have, are kept in the host's memory, page-locked, so that
    nobody waits for the copy: they are kept for when the GPU's runs out.
    """

    LARGE = 1 << 16

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(self) -> None:
        now = dict(self._network.named_buffers())
        for name, buffer in now.items():
            if name not in self._kept or self._kept[name].shape != buffer.shape:
                self._kept[name] = self._room_for(buffer)
        self._kept = {name: self._kept[name] for name in now}
        here = [name for name in now if self._kept[name].device == now[name].device]
        if here:
            torch._foreach_copy_([self._kept[name] for name in here], [now[name] for name in here])
        for name in now.keys() - here:
            self._kept[name].copy_(now[name], non_blocking=True)
        self._random = torch.get_rng_state()
        self._random_on_gpu = torch.cuda.get_rng_state() if cuda_is_in_use() else None

    @torch.no_grad()
    def restore(self) -> None:
        for name, buffer in self._network.named_buffers():
            buffer.resize_(self._kept[name].shape).copy_(self._kept[name])
        torch.set_rng_state(self._random)
        if self._random_on_gpu is not None:
            torch.cuda.set_rng_state(self._random_on_gpu)

    def _room_for(self, buffer: Tensor) -> Tensor:
        if buffer.device.type != "cuda" or buffer.numel() <= self.LARGE:
            return torch.empty_like(buffer)
        try:
            return torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
        except RuntimeError:  # no more memory can be page-locked
            return torch.empty(buffer.shape, dtype=buffer.dtype)


def names_of(images: Sequence[str], most: int = 16) -> str:
    return ", ".join(images[:most]) + (f" and {len(images) - most} more" if len(images) > most else "")
