"""Learning rate as a function of the optimizer step: burn-in, then a policy (darknet network.c, get_current_rate)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.console import counted
from utils.errors import UserError

POLICIES = ("constant", "steps", "step", "exp", "poly", "sig", "sgdr", "cosine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate of each optimizer step; `scales` multiply it at `steps`.

    Steps count from 1, as in darknet: the first update of a burn-in of B steps has rate base * (1 / B)^power, not 0.

    step, gamma and cycle_steps are meant for a training of cfg_steps (0: of total_steps) and keep their proportion in
    one of another length. Raises UserError for a value that its policy cannot use, such as darknet's defaults of step,
    exp and sig.
    """

    policy: str
    base_rate: float
    total_steps: int
    burn_in_steps: int = 0
    power: float = 4.0
    steps: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    final_rate: float = 0.0
    cfg_steps: int = 0
    step: int = 1
    scale: float = 1.0
    gamma: float = 1.0
    cycle_steps: int = 0
    cycle_mult: float = 2.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"unknown learning-rate policy '{self.policy}': choose one of {', '.join(POLICIES)}")
        if len(self.steps) != len(self.scales):
            raise UserError(f"{len(self.steps)} learning-rate steps but {len(self.scales)} scales")
        if self.policy == "step" and not 0 < self.scale < 1:
            raise UserError(f"learning-rate policy step needs a scale between 0 and 1 in [net], not {self.scale:g}")
        if self.policy == "exp" and not 0 < self.gamma < 1:
            raise UserError(f"learning-rate policy exp needs a gamma between 0 and 1 in [net], not {self.gamma:g}")
        if self.policy == "sig" and self.gamma == 1:
            raise UserError("learning-rate policy sig needs a gamma other than 1 in [net]")
        if self.policy == "sgdr" and self.cycle_mult < 1:
            raise UserError(f"learning-rate policy sgdr needs an sgdr_mult of 1 or more, not {self.cycle_mult:g}")

    def rate(self, step: int) -> float:
        """Return the learning rate of the update after `step` finished ones."""
        number = step + 1
        if number < self.burn_in_steps:
            return self.base_rate * (number / self.burn_in_steps) ** self.power
        base, now = self.base_rate, self._in_cfg_steps(number)
        match self.policy:
            case "steps":
                return base * math.prod(s for at, s in zip(self.steps, self.scales, strict=True) if at <= number)
            case "step":
                return base * self.scale ** (now // self.step)
            case "exp":
                return base * self.gamma**now
            case "poly":
                return base * max(0.0, 1 - number / self.total_steps) ** self.power
            case "sig":  # through half the rate at `step`, with slope `gamma`
                return base / (1 + math.exp(min(self.gamma * (now - self.step), 700.0)))
            case "sgdr":
                return self._on_cosine(self._share_of_cycle(now))
            case "cosine":
                return self._on_cosine(min(1.0, number / max(1, self.total_steps)))
        return base

    def _in_cfg_steps(self, number: int) -> float:
        # Product first: the last step is then exactly the cfg's last one, and no new cycle begins.
        return number * self.cfg_steps / self.total_steps if self.cfg_steps else float(number)

    def _share_of_cycle(self, now: float) -> float:
        """Return which share of its cycle has passed (SGDR: Loshchilov & Hutter 2017, eq. 5).

        The first cycle has cycle_steps (0: the whole training), each later one `cycle_mult` times the one before.
        """
        start, cycle = 0.0, float(self.cycle_steps or self.cfg_steps or self.total_steps)
        while start + cycle < now:
            start, cycle = start + cycle, cycle * self.cycle_mult
        return (now - start) / cycle

    def _on_cosine(self, done: float) -> float:
        """Return the rate after this share of a half period that ends at final_rate."""
        return self.final_rate + (self.base_rate - self.final_rate) * (1 + math.cos(math.pi * done)) / 2

    def words(self) -> str:
        """Return a summary: "2000 steps: 200 of burn-in, then steps at 1600, 1800 from 0.01"."""
        burn_in = f"{self.burn_in_steps} of burn-in, then " if self.burn_in_steps else ""
        at = f" at {', '.join(map(str, self.steps))}" if self.policy == "steps" and self.steps else ""
        return f"{counted(self.total_steps, 'step')}: {burn_in}{self.policy}{at} from {self.base_rate:g}"
