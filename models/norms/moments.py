"""First and second moments of populations, and how populations are pooled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Count () of positions, mean (C,) and biased variance (C,). A count of 0 is the empty population."""

    count: Tensor
    mean: Tensor
    var: Tensor

    @staticmethod
    def of(y: Tensor) -> Moments:
        """Return the moments per channel over (N, H, W), in at least float32 whatever y's dtype."""
        y = y.detach().to(torch.promote_types(y.dtype, torch.float32))
        mean, var = _mean_var(y)
        return Moments(count=mean.new_full((), y.numel() // y.shape[1]), mean=mean, var=var)

    def merged_with(self, other: Moments) -> Moments:
        """Return the union's moments (Chan, Golub & LeVeque 1979), not by E[y^2] - E[y]^2, which cancels.

        The union of two empty populations is empty.
        """
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        step = other.mean - self.mean
        return Moments(
            count=count,
            mean=torch.addcmul(self.mean, share, step),
            var=torch.lerp(self.var, other.var, share).addcmul(step * step, share * (1 - share)),
        )


def _mean_var(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (C,) mean and biased variance of y (N, C, H, W), by the fastest kernel that does not cancel.

    On a CPU `torch.var_mean` and batch norm's own statistics loop are slow (0.72 and 0.15 ms for 4x16x64x64 on
    2 cores); group norm with one channel a group has each row's moments in 0.03 ms, by Welford's method.
    """
    images, channels, height, width = y.shape
    if y.device.type == "cpu" and y.is_contiguous() and y.numel():
        _, mean, rstd = torch.ops.aten.native_group_norm(y, None, None, images, channels, height * width, channels, 0.0)
        # A row without variance has 1 / 0 there, and 1 / inf^2 is the 0 we want.
        rows = rstd.pow(-2)
        if images == 1:
            return mean[0], rows[0]
        centre = mean.mean(0)
        return centre, rows.mean(0) + (mean - centre).square().mean(0)
    if y.device.type == "cpu":
        # Two passes; batch norm's own channels-last loop adds up 30,000 numbers one by one in float32.
        mean = y.mean((0, 2, 3))
        return mean, (y - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    return mean, var
