"""Batch renormalization (Ioffe 2017, arXiv 1702.03275): values as by the running statistics, within limits.

y_hat = xhat * r + d, r = sigma_B / sigma clamped to 1/r_max..r_max and d = (mu_B - mu) / sigma to +-d_max, both
constants for the gradient (section 3). The limits open linearly from plain batch norm, as in section 4 of the
paper; there r_max reaches 3 and d_max 5.

Here the running statistics are averages of both moments, moved once per batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.norms.batch_stat import BatchStatNorm
from models.norms.moments import Moments
from utils.clock import Tick


class BatchRenorm(BatchStatNorm):
    """Plain BN before `burn_in_steps`; the limits are fully open `ramp_steps` later."""

    def __init__(
        self,
        channels: int,
        *,
        r_max: float,
        d_max: float,
        burn_in_steps: int,
        ramp_steps: int,
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.limits = (r_max, d_max)
        self.burn_in_steps, self.ramp_steps = burn_in_steps, ramp_steps
        self.register_buffer("r_max", torch.ones(()), persistent=False)
        self.register_buffer("d_max", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def announce(self, tick: Tick) -> None:
        super().announce(tick)
        steps_open = tick.step - self.burn_in_steps
        opened = min(max((steps_open + 1) / max(self.ramp_steps, 1), 0.0), 1.0)
        r_max, d_max = self.limits
        known = (self.num_batches_tracked > 0).to(self.r_max.dtype)  # running statistics of nothing are no target
        self.r_max.copy_(1 + known * opened * (r_max - 1))
        self.d_max.copy_(known * opened * d_max)

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        running = Moments(count=own.count, mean=self.running_mean, var=self.running_var)
        return self.by_own_moments_renormed(y, own, running, r_max=self.r_max, d_max=self.d_max)
