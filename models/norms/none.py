"""No norm: the convolution gets a bias instead."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models.norms.spec import NormSpec
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class NoNormSpec(NormSpec):
    """A convolution with a bias."""

    name = "none"
    summary = "nothing; a bias in place of the norm"
    source = "baseline"
    normalizes = False
    has_batch_statistics = False
    has_running_statistics = False

    def __post_init__(self) -> None:
        if self.ws:
            raise UserError("--norm none has no option ws: standardized filters need a norm that restores the scale")

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> None:
        return None

    def values_per_statistic(self, channels: int, positions: int, *, mini_batch: int) -> None:
        return None


SPECS: tuple[type[NormSpec], ...] = (NoNormSpec,)
