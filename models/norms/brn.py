"""Batch renormalization (Ioffe 2017, arXiv:1702.03275): the values that the running statistics give, within limits.

y_hat = xhat * r + d, with r = sigma_B / sigma clamped to 1/r_max..r_max and d = (mu_B - mu) / sigma clamped to +-d_max,
both constants for the gradient (section 3). The limits open linearly, starting from plain batch norm, as in section 4
of the paper, where r_max reaches 3 and d_max 5. Here the running statistics average both moments, once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.moments import Moments
from models.norms.spec import Cut, NormSpec, burn_in_knob
from utils.clock import Tick
from utils.knob import knob


class BatchRenorm(BatchStatNorm):
    """Plain BN for `burn_in_steps`; the limits are fully open `ramp_steps` later."""

    r_max: Tensor  # () the limits at the current step
    d_max: Tensor  # ()

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
        # Running statistics that have seen no batch are no target.
        known = (self.num_batches_tracked > 0).to(self.r_max.dtype)
        self.r_max.copy_(1 + known * opened * (r_max - 1))
        self.d_max.copy_(known * opened * d_max)

    def normalize(self, y: Tensor, own: Moments, pool: Moments) -> Tensor:
        running = Moments(count=own.count, mean=self.running_mean, var=self.running_var)
        return self.by_own_moments_renormed(y, own, running, r_max=self.r_max, d_max=self.d_max)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRenormSpec(NormSpec):
    """Batch renormalization."""

    name = "brn"
    summary = "the running statistics, within limits"
    source = "Ioffe. Batch Renormalization. NeurIPS 2017, arXiv:1702.03275"

    r_max: float = knob(3.0, "largest ratio to the running deviation", low=1)
    d_max: float = knob(5.0, "largest shift, in running deviations", low=0)
    burn_in_steps: int | None = burn_in_knob()
    ramp_steps: int | None = knob(None, "steps in which the limits open after burn-in (default: 4 times that)", low=0)

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        options = self.options
        if self.ramp_steps is None:
            options["ramp_steps"] = 4 * self.burn_in
        return BatchRenorm(conv.out_channels, **options, eps=eps, momentum=momentum)

    def images(self, cut: Cut, *, momentum: float) -> float:
        """Return the time constant of the running average; without momentum it averages all batches."""
        return cut.batch / max(momentum, 1e-3)


SPECS: tuple[type[NormSpec], ...] = (BatchRenormSpec,)
