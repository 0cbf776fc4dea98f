"""First and second moments of populations, and how populations are pooled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """count: () positions; mean, var: (C,), var biased. A count of 0 is the empty population."""

    count: Tensor
    mean: Tensor
    var: Tensor

    @staticmethod
    def of(y: Tensor) -> Moments:
        """Per channel over (N, H, W), in at least float32 whatever y's dtype."""
        y = y.detach().to(torch.promote_types(y.dtype, torch.float32))
        var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        return Moments(count=mean.new_full((), y.numel() // y.shape[1]), mean=mean, var=var)

    def share_of(self, other: Moments) -> Tensor:
        """() in 0..1: other's part of the union's positions; 1 when both are empty."""
        total = self.count + other.count
        return torch.where(total > 0, other.count / total.clamp(min=1), torch.ones_like(total))

    def merged_with(self, other: Moments) -> Moments:
        """The union's moments (Chan, Golub & LeVeque 1979): never E[y^2] - E[y]^2, which cancels."""
        share = self.share_of(other)
        step = other.mean - self.mean
        return Moments(
            count=self.count + other.count,
            mean=self.mean + share * step,
            var=torch.lerp(self.var, other.var, share) + share * (1 - share) * step * step,
        )
