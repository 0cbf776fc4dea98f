"""Learning rate as a function of the optimizer step: burn-in, then a policy (darknet network.c, get_current_rate)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate of each optimizer step; `scales` multiply it at `steps`.

    Steps count from 1, as in darknet: the first update of a burn-in of B steps has rate base * (1 / B)^power, not 0.

    step, gamma and cycle_steps are meant for a training of cfg_steps (0: of total_steps) and keep their proportion in
    one of another length. Each policy below documents what it reads. Raises UserError for a value that its policy
    cannot use, such as the defaults of step, exp and sig in darknet.
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
        return POLICIES[self.policy](self, number)

    def words(self) -> str:
        """Return a summary: "2000 steps: 200 of burn-in, then steps at 1600, 1800 from 0.01"."""
        burn_in = f"{self.burn_in_steps} of burn-in, then " if self.burn_in_steps else ""
        at = f" at {', '.join(map(str, self.steps))}" if self.policy == "steps" and self.steps else ""
        return f"{self.total_steps} steps: {burn_in}{self.policy}{at} from {self.base_rate:g}"

    def average_decay(self) -> float:
        """Return the EMA decay with a memory of about the last twentieth of the training."""
        return min(0.9999, max(0.9, 1 - 20 / max(1, self.total_steps)))


def _in_cfg_steps(schedule: Schedule, number: int) -> float:
    # Product first: the last step is then exactly the cfg's last one, and no new cycle begins.
    return number * schedule.cfg_steps / schedule.total_steps if schedule.cfg_steps else float(number)


def _constant(schedule: Schedule, number: int) -> float:
    return schedule.base_rate


def _steps(schedule: Schedule, number: int) -> float:
    """Multiply by each of `scales` at its step."""
    passed = (scale for at, scale in zip(schedule.steps, schedule.scales, strict=True) if at <= number)
    return schedule.base_rate * math.prod(passed)


def _step(schedule: Schedule, number: int) -> float:
    """Multiply by `scale` every `step` steps."""
    return schedule.base_rate * schedule.scale ** (_in_cfg_steps(schedule, number) // schedule.step)


def _exp(schedule: Schedule, number: int) -> float:
    """Multiply by `gamma` each step."""
    return schedule.base_rate * schedule.gamma ** _in_cfg_steps(schedule, number)


def _poly(schedule: Schedule, number: int) -> float:
    """Decay to 0 as the remaining share of the training to the `power`."""
    return schedule.base_rate * max(0.0, 1 - number / schedule.total_steps) ** schedule.power


def _sig(schedule: Schedule, number: int) -> float:
    """Decay as a sigmoid, through half the rate at `step`, with slope `gamma`."""
    beyond = schedule.gamma * (_in_cfg_steps(schedule, number) - schedule.step)
    return schedule.base_rate / (1 + math.exp(min(beyond, 700.0)))


def _sgdr(schedule: Schedule, number: int) -> float:
    """Decay as cosines to final_rate with warm restarts (Loshchilov & Hutter 2017, eq. 5).

    The first cycle has cycle_steps (0: the whole training), each later one `cycle_mult` times the one before.
    """
    now, start = _in_cfg_steps(schedule, number), 0.0
    cycle = float(schedule.cycle_steps or schedule.cfg_steps or schedule.total_steps)
    while start + cycle < now:
        start, cycle = start + cycle, cycle * schedule.cycle_mult
    return _on_cosine(schedule, (now - start) / cycle)


def _cosine(schedule: Schedule, number: int) -> float:
    """Decay as one cosine to final_rate over the whole training."""
    return _on_cosine(schedule, min(1.0, number / max(1, schedule.total_steps)))


def _on_cosine(schedule: Schedule, done: float) -> float:
    return schedule.final_rate + (schedule.base_rate - schedule.final_rate) * (1 + math.cos(math.pi * done)) / 2


POLICIES: dict[str, Callable[[Schedule, int], float]] = {
    "constant": _constant,
    "steps": _steps,
    "step": _step,
    "exp": _exp,
    "poly": _poly,
    "sig": _sig,
    "sgdr": _sgdr,
    "cosine": _cosine,
}
