"""Learning rate as a function of the optimizer step: burn-in, then a policy (darknet network.c, get_current_rate)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.errors import UserError

POLICIES = ("constant", "steps", "cosine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Rates are per optimizer step. `steps` are the optimizer steps at which `scales` multiply the rate.

    The step that is about to be taken counts from 1, as in darknet: the first update of a burn-in of B steps
    has the rate base * (1 / B)^power, not 0.
    """

    policy: str
    base_rate: float
    total_steps: int
    burn_in_steps: int = 0
    burn_in_power: float = 4.0
    steps: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    final_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"unknown learning-rate policy '{self.policy}': choose one of {', '.join(POLICIES)}")
        if len(self.steps) != len(self.scales):
            raise UserError(f"{len(self.steps)} learning-rate steps but {len(self.scales)} scales")

    def rate(self, step: int) -> float:
        """Learning rate of the update after `step` finished ones."""
        number = step + 1
        if number < self.burn_in_steps:
            return self.base_rate * (number / self.burn_in_steps) ** self.burn_in_power
        if self.policy == "steps":
            passed = (scale for at, scale in zip(self.steps, self.scales, strict=True) if at <= number)
            return self.base_rate * math.prod(passed)
        if self.policy == "cosine":
            # SGDR without restarts (Loshchilov & Hutter 2017, eq. 5).
            done = min(1.0, number / max(1, self.total_steps))
            return self.final_rate + (self.base_rate - self.final_rate) * (1 + math.cos(math.pi * done)) / 2
        return self.base_rate

    def average_decay(self) -> float:
        """Decay of averaged weights that remembers about the last twentieth of the training."""
        return min(0.9999, max(0.9, 1 - 20 / max(1, self.total_steps)))
