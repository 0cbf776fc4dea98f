"""The training step: zero_grad, forward, loss and backward of each mini-batch, NaN check, clipping, optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.amp import MixedPrecision
from engine.loss_watch import remedies
from engine.not_finite import NotFinite, find_not_finite
from engine.oom_recovery import OutOfMemoryRecovery
from models.network import Network
from models.offload import saved_on_host
from models.yolo.criterion import Criterion
from utils import ranks
from utils.clock import BatchClock
from utils.structures import Batch


@dataclass(kw_only=True, eq=False)
class TrainStep:
    """One optimizer step. Call it with a Batch that has its images on the network's device.

    Returns a (3,) CPU tensor: box, objectness and class loss, averaged over the images. Targets are on the CPU. Every
    rank calls it with its own share of the batch; gradients and losses are reduced over all ranks.

    forward: the network, or its wrapper that shuffles images. by_domain: whether to cut a batch where the domain of
    its images changes, too. Raises NotFinite, before anything is updated, if a loss or a gradient is NaN or Inf, and
    UserError if a single image does not fit into memory.
    """

    network: Network
    forward: nn.Module
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    precision: MixedPrecision
    clock: BatchClock
    recovery: OutOfMemoryRecovery
    clip_norm: float | None
    by_domain: bool = False
    offload_activations: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        all_images = len(batch) * ranks.world_size()
        for attempt in self.recovery.attempts(len(batch)):
            with attempt:  # swallows an out-of-memory error; the next attempt cuts the batch finer
                self.optimizer.zero_grad(set_to_none=True)
                losses = torch.zeros(3, device=batch.images.device)
                parts = self._cut(batch)
                for part in self.clock.minibatches(parts, [part.domains for part in parts]):
                    heads = terms = None  # free the previous mini-batch's graph before the next forward
                    saved = saved_on_host(self.network) if self.offload_activations else nullcontext()
                    with saved, self.precision.autocast():
                        heads = self.forward(part.pixels())
                    terms = self.criterion(heads, part.targets)
                    # Divided by all images of this rank's batch, so the gradient does not depend on how it was cut.
                    torch.autograd.backward(self.precision.scaler.scale(terms.total * (1 / len(batch))))
                    losses += terms.detached() / all_images
            heads = terms = None  # free a failed attempt's graph before the next one starts

        ranks.average_gradients(self.network.parameters())
        losses = ranks.all_reduce_sum(losses)
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        gradient_norm = nn.utils.get_total_norm(gradients)
        # One copy, and the only place where the host waits for a GPU (fp16 waits once more, for its loss scale).
        on_host = torch.cat((losses, gradient_norm.to(losses).view(1))).cpu()
        losses, gradient_norm = on_host[:3], on_host[3]
        if not losses.isfinite().all() or not (gradient_norm.isfinite() or self.precision.may_overflow()):
            raise self._not_finite(batch, losses)

        if self.clip_norm is not None:
            self.precision.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        self.precision.step(self.optimizer)
        self.clock.stepped()
        return losses

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the steps that follow: of each group of parameters, `rate` times its lr_scale."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def _cut(self, batch: Batch) -> list[Batch]:
        return list(batch.split(self.recovery.subdivisions, by_domain=self.by_domain))

    @property
    def remedies(self) -> str:
        """Return what to change in the next training if this one diverges."""
        return remedies(is_sgd=isinstance(self.optimizer, torch.optim.SGD), clip_norm=self.clip_norm)

    def _not_finite(self, batch: Batch, losses: Tensor) -> NotFinite:
        """Name what is not finite, and the remedies; images only last, unless it is they."""
        found, is_data = find_not_finite(
            self.network,
            self.criterion,
            self._cut(batch),
            is_loss_finite=bool(losses.isfinite().all()),
            precision=self.precision,
        )
        start = f"step {self.clock.step + 1}: {found}"
        if is_data:
            return NotFinite(f"{start}: correct that file, and go on from last.pt with --resume")
        return NotFinite(
            f"{start}, the training has diverged: start again with {self.remedies}; or go on from last.pt, which holds "
            "earlier weights, with --resume and a lower --learning-rate or --clip-norm; if nothing helps, look at the "
            f"images of this batch: {_names(batch.paths)}"
        )


def _names(paths: Sequence[str], most: int = 16) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")
