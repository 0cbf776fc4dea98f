"""What a norm may ask for beyond its input.

A norm claims none, some or all of four capabilities, so `nn.BatchNorm2d`, `nn.GroupNorm` or anybody's norm
plugs in unchanged:

- `ConvAware`: it is called with `(y, ConvView)` instead of `(y)`, because it needs the convolution before it.
- `BatchAware` (utils/clock.py): the trainer tells it which mini-batch of which batch comes next.
- `ActivationAware`: the block asks it, when it is built, whether it takes over the activation that follows.
- `PoolsMoments`: it tells by which moments it normalized, where they were not the mini-batch's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norms import across_ranks
from models.norms.moments import Moments
from models.norms.used_weight import used_weight

_MOST_SCALE = 10.0  # of a grid's variance; with 256 positions 0.8..1.25 is usual


class ConvView:
    """The convolution that made a norm's input, seen as y = W . patches, with the geometry hidden.

    Shapes: C output channels, G groups, K = (input channels / G) * kh * kw numbers in a patch.
    """

    def __init__(self, conv: nn.Conv2d, x: Tensor) -> None:
        self._conv, self._x, self._padding = conv, x.detach(), conv.padding
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            self._x, self._padding = F.pad(self._x, conv._reversed_padding_repeated_twice, mode), (0, 0)

    def of_images(self, images: Sequence[int]) -> ConvView:
        """Return the view of some images of the mini-batch, in this order."""
        each = self._x.chunk(len(self._x))
        return ConvView(self._conv, torch.cat([each[image] for image in images]))

    @property
    def weight(self) -> Tensor:
        """The weight that patches are multiplied with, (C, in/G, kh, kw), attached."""
        return used_weight(self._conv)

    @property
    def bias(self) -> Tensor | None:
        """(C,) that the convolution adds, attached. The formulas treat it as the weight of one more 1 in each patch."""
        return self._conv.bias

    def mean_output(self, mean_patch: Tensor) -> Tensor:
        """Return the mean (..., C), detached, that patches of the mean (..., G, K) give with the current weights."""
        mean = self.along_weight(mean_patch)
        return mean if self.bias is None else mean + self.bias.detach()

    def along_weight(self, per_patch: Tensor) -> Tensor:
        """Return the dot product of (..., C, K) or (..., G, K) with each filter, (..., C), detached."""
        weight = self.weight.detach().flatten(1).to(per_patch.dtype)
        if per_patch.ndim > 2:
            return torch.stack([self.along_weight(each) for each in per_patch])
        if per_patch.shape[0] == 1:
            with torch.autocast(weight.device.type, enabled=False):  # which would round statistics to bfloat16
                return weight @ per_patch[0]
        return (self.per_channel(per_patch) * weight).sum(-1)

    def patches_with(
        self, y: Tensor, own: Moments, *, positions: int, sync: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean patch (G, K), the covariance of y and patch (C, K), and the covariance along the filter (C,).

        The covariance is taken from a grid of at least `positions` positions (0 = all; docs/norms.md has the error) and
        scaled: along the filter it is the variance of y over all positions. With sync, `own` and the results are those
        of all ranks together.
        """
        parallel = sync and across_ranks.is_parallel()
        local = Moments.of(y) if parallel else own
        with torch.no_grad():  # as a decorator, torch 2.14 would not compile it
            patch = self.mean_patch(own.mean.dtype)
            cov, along = self.covariance(y, local, positions=positions)
            if parallel:
                share = local.count / own.count
                patch, step = self._pooled_patch(patch, share)
                (cov,) = across_ranks.sum_over_ranks(
                    share * (cov + (local.mean - own.mean)[:, None] * self.per_channel(step))
                )
                along = self.along_weight(cov)
        return patch, cov, along

    def pooled_mean_patch(self, y: Tensor, own: Moments, *, sync: bool = False) -> Tensor:
        """Return the mean patch (G, K); with sync that of all ranks, which together have the moments `own`."""
        with torch.no_grad():
            patch = self.mean_patch(own.mean.dtype)
            return self._pooled_patch(patch, y.numel() // y.shape[1] / own.count)[0] if sync else patch

    def _pooled_patch(self, patch: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean patch of all ranks, of whose positions this one holds `share`, and the step to this one's."""
        (union,) = across_ranks.sum_over_ranks(share * patch)
        return union, patch - union

    def covariance(self, y: Tensor, own: Moments, *, positions: int = 0) -> tuple[Tensor, Tensor]:
        """Return cov(y, patch) (C, K) for the convolution's output y, and along the filter (C,): see `patches_with`.

        As y = W . patch, the latter is the variance of y over the grid: no pass over C * K numbers is needed.
        """
        rows, columns = grid_steps(y.shape, positions)
        seen = y.detach()[:, :, ::rows, ::columns].to(own.mean.dtype)
        centred = seen - seen.mean((0, 2, 3), keepdim=True)
        on_grid = centred.square().mean((0, 2, 3))
        # A grid that misses (nearly) all the spread has no information to scale up.
        scale = torch.where(on_grid > 0, own.var / on_grid, 1).clamp(max=_MOST_SCALE)
        centred *= (scale * (seen.shape[1] / seen.numel())).view(1, -1, 1, 1)
        return self.correlate(centred, steps=(rows, columns)), on_grid * scale

    def correlate(self, grad: Tensor, *, steps: tuple[int, int] = (1, 1)) -> Tensor:
        """Return the sum over positions of grad * patch, (C, K) in grad's dtype: the convolution's weight gradient.

        grad: (N, C, H, W) like the convolution's output, or every steps-th of its rows and columns.
        """
        conv = self._conv
        return torch.ops.aten.convolution_backward(
            grad,
            self._x.to(grad.dtype),
            conv.weight.detach().to(grad.dtype),
            None,
            [stride * step for stride, step in zip(conv.stride, steps, strict=True)],
            self._padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            [False, True, False],
        )[1].flatten(1)

    def mean_patch(self, dtype: torch.dtype) -> Tensor:
        """Return the mean patch over images and positions, (G, K): one row a group, shared by its channels.

        A patch has the padding beyond the edge. Rows and columns separate, so two small matrix products are enough.
        """
        conv, mean_image = self._conv, self._x.to(dtype).mean(0)
        # A compiler makes them constants of its graph, and would warn about a cache.
        share_under_tap = _share_under_tap.__wrapped__ if torch.compiler.is_compiling() else _share_under_tap
        rows, columns = (
            share_under_tap(*sizes, dtype=dtype, device=mean_image.device)
            for sizes in zip(
                mean_image.shape[1:], conv.kernel_size, conv.stride, self._padding, conv.dilation, strict=True
            )
        )
        with torch.autocast(mean_image.device.type, enabled=False):  # which would round statistics to bfloat16
            return (rows @ (mean_image @ columns.mT)).reshape(conv.groups, -1)

    def per_channel(self, per_group: Tensor) -> Tensor:
        """Return (..., G, K) as (..., C, K): each channel gets its group's row. C rows are returned unchanged."""
        channels = self._conv.out_channels
        return per_group if per_group.shape[-2] == channels else per_channel(per_group, channels)


@lru_cache(maxsize=1024)
def _share_under_tap(
    size: int, kernel: int, stride: int, pad: int, dilation: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (kernel, size): 1 / the line's outputs where tap k of a kernel meets pixel i of a line, else 0."""
    outputs = (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    pixel, tap = torch.arange(size, device=device), torch.arange(kernel, device=device)
    start = pixel + pad - dilation * tap[:, None]  # of the kernel whose tap k meets pixel i, in padded pixels
    return ((start >= 0) & (start <= stride * (outputs - 1)) & (start % stride == 0)).to(dtype) / outputs


def grid_steps(shape: torch.Size, positions: int) -> tuple[int, int]:
    """Return the steps (rows, columns) of the coarsest grid over (N, C, H, W) with at least `positions` positions.

    No image is left out: the spread between images is most of a small mini-batch's information.
    """
    images, _, height, width = shape
    if positions < 1 or images < 1:
        return 1, 1
    total = images * height * width
    best = (total, 1, 1, 1)  # positions, the longer of the two, rows, columns: of equal grids the squarest
    for rows in range(1, min(height, max(total // positions, 1)) + 1):
        seen_rows = images * -(-height // rows)
        needed = -(-positions // seen_rows)  # columns of the grid
        columns = max((width - 1) // (needed - 1), 1) if needed > 1 else width
        seen = seen_rows * -(-width // columns)
        if seen >= positions:
            best = min(best, (seen, max(rows, columns), rows, columns))
    return best[2], best[3]


def per_channel(per_group: Tensor, channels: int) -> Tensor:
    """Return (..., G, K) as (..., channels, K): each channel gets its group's row."""
    groups = per_group.shape[-2]
    if groups == 1:
        return per_group.expand(*per_group.shape[:-2], channels, per_group.shape[-1])
    return per_group.repeat_interleave(channels // groups, dim=-2)


class ConvAware(ABC):
    """A norm that must see the convolution before it."""

    @abstractmethod
    def forward(self, y: Tensor, view: ConvView) -> Tensor:
        """Normalize y (N, C, H, W), the output of the convolution behind `view`."""


class ActivationAware(ABC):
    """A norm that can apply the activation after it: fused with it, or one of its own in its place."""

    @abstractmethod
    def take_over(self, activation: nn.Module) -> bool:
        """Apply `activation`, or the norm's own in its place, from now on. Return False, and change nothing, where the
        activation is to follow the norm. Never called for a norm that none follows."""


class PoolsMoments:
    """A norm that can normalize by other moments than the mini-batch's own, and tells which.

    used_moments: mean and variance (C,) that normalized the last mini-batch of the training; None if they were its own.
    """

    used_moments: tuple[Tensor, Tensor] | None = None


def may_be_replaced(activation: nn.Module) -> bool:
    """Return whether a norm with an activation of its own replaces this one.

    It leaves a layer linear that is linear, and between its limits one that is a gate or a bounded output.
    """
    return type(activation) not in (nn.Identity, nn.Sigmoid, nn.Tanh, nn.Hardtanh)
