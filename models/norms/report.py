"""The distance of mini-batches' statistics from the population's, layer by layer.

One pass in eval mode takes the moments of every image at every norm; those of mini-batches are pooled from them
(Chan et al.). Each layer's input has been normalized by population statistics, so the distance is the layer's own
noise, not what it inherits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.network import Network
from models.norms.moments import Moments
from models.norms.running_stats import as_used, eval_mode, norms_with_statistics, pixels_for, running_moments, watched
from utils.console import counted
from utils.errors import UserError

SIZES = (1, 2, 4, 8, 16)
LARGE = 0.3  # a gap that the verdict names


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGap:
    """Distances at one norm, by mini-batch size.

    sigma: the root mean square, over channels and mini-batches b, of sigma_b / sigma - 1. mean: that of
    (mu_b - mu) / sigma. mu and sigma are the running statistics, with sigma the root of variance + eps. stale_sigma,
    stale_mean: the same for all images together, which is how outdated the running statistics are.
    """

    layer: int
    name: str
    channels: int
    sigma: dict[int, float]
    mean: dict[int, float]
    stale_sigma: float
    stale_mean: float

    def at(self, size: int) -> float:
        """Return the larger of the two gaps for mini-batches of `size`."""
        return max(self.sigma[size], self.mean[size])

    @property
    def stale(self) -> float:
        """The larger of the two gaps of all images together."""
        return max(self.stale_sigma, self.stale_mean)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormReport:
    """Gaps of all layers in order of the cfg, for the mini-batch sizes of which `images` images make at least one."""

    layers: tuple[LayerGap, ...]
    sizes: tuple[int, ...]
    images: int

    def table(self) -> str:
        """Return the gaps in per cent, a row a layer."""
        columns = [*map(str, self.sizes), "all"]
        cells = "".join(f"{column:>6}" for column in columns)
        half = 6 * len(columns)
        width = max(len(gap.name) for gap in self.layers)
        lines = [
            f"{'':{width + 16}} |{'sigma_b / sigma - 1, %':>{half}} |{'(mu_b - mu) / sigma, %':>{half}}",
            f"layer {'':{width}}  channels |{cells} |{cells}   <- images b",
        ]
        for gap in self.layers:
            halves = (
                "".join(f"{100 * value:6.0f}" for value in (*gaps.values(), stale))
                for gaps, stale in ((gap.sigma, gap.stale_sigma), (gap.mean, gap.stale_mean))
            )
            lines.append(f"{gap.layer:5} {gap.name:{width}}  {gap.channels:8} |" + " |".join(halves))
        return "\n".join(lines)

    def verdict(self, *, mini_batch: int, effective: int | None) -> str:
        """Return the table's meaning for a training with such mini-batches and statistics of `effective` images.

        effective None: it did not normalize by statistics of mini-batches.
        """
        lines = [self._at(mini_batch, f"mini-batches of {counted(mini_batch, 'image')}")]
        if effective is not None and effective != mini_batch:
            lines.append(self._at(effective, f"{counted(effective, 'image')} pooled"))
        is_stale = any(gap.stale > LARGE for gap in self.layers)
        lines.append(
            f"running statistics against these {self.images} images: {self._worst(lambda gap: gap.stale)}"
            + ("; evaluate.py --recalibrate-on replaces them" if is_stale else "")
        )
        return "\n".join(lines)

    def _at(self, images: int, subject: str) -> str:
        size = max(size for size in self.sizes if size <= max(images, 1))
        measured = "" if size == images else f" (measured at {size})"
        return f"{subject}{measured}: {self._worst(lambda gap: gap.at(size))}"

    def _worst(self, value: Callable[[LayerGap], float]) -> str:
        worst = max(self.layers, key=value)
        large = [gap for gap in self.layers if value(gap) > LARGE]
        if not large:
            return f"no layer differs by more than {LARGE:.0%}, the most is {value(worst):.0%} in layer {worst.layer}"
        named = ", ".join(str(gap.layer) for gap in large[:12]) + (" ..." if len(large) > 12 else "")
        return (
            f"{len(large)} of {len(self.layers)} layers differ by more than {LARGE:.0%} ({named}), "
            f"the most {value(worst):.0%} in layer {worst.layer}"
        )


@torch.no_grad()
def measure_norms(network: Network, batches: Sequence[Tensor]) -> NormReport:
    """Measure the gaps of every norm with running statistics.

    batches: images (N, 3, H, W) of one size, uint8 or float in 0..1, in random order: neighbours are pooled. Raises
    UserError for a network without running statistics, and where there is no image.
    """
    norms = norms_with_statistics(network)
    images = sum(map(len, batches))
    if not images:
        raise UserError("there is no image to take statistics from")
    sizes = tuple(size for size in SIZES if size <= images)
    seen = _moments_of_images(network, norms, batches)
    return NormReport(
        layers=tuple(_gap(network, name, norms[name], moments, sizes) for name, moments in seen.items()),
        sizes=sizes,
        images=images,
    )


def pooled_pairs(moments: Moments) -> Moments:
    """Pool each two neighbours: mean, var (n, C), all of one count, become (n // 2, C)."""
    even = len(moments.mean) // 2 * 2
    first, second = (
        Moments(count=moments.count, mean=moments.mean[start:even:2], var=moments.var[start:even:2]) for start in (0, 1)
    )
    return first.merged_with(second)


def _moments_of_images(network: Network, norms: dict[str, nn.Module], batches: Sequence[Tensor]) -> dict[str, Moments]:
    """Return by the norm's name, in order of layers: count () positions of an image, mean and var (images, C)."""
    seen: dict[nn.Module, list[Moments]] = {norm: [] for norm in norms.values()}
    with eval_mode(network), watched(seen, lambda norm, y: seen[norm].append(_of_each_image(y))):
        for images in batches:
            network(pixels_for(network, images))
    return {
        name: Moments(
            count=seen[norm][0].count,
            mean=torch.cat([moments.mean for moments in seen[norm]]),
            var=torch.cat([moments.var for moments in seen[norm]]),
        )
        for name, norm in norms.items()
    }


def _of_each_image(y: Tensor) -> Moments:
    """Return mean and var (N, C) of y (N, C, H, W)."""
    images, channels, height, width = y.shape
    rows = Moments.of(y.reshape(1, images * channels, height, width))
    return Moments(count=rows.count, mean=rows.mean.view(images, channels), var=rows.var.view(images, channels))


def _gap(network: Network, name: str, norm: nn.Module, of_images: Moments, sizes: tuple[int, ...]) -> LayerGap:
    sigma, mean = {}, {}
    pooled = of_images
    for size in sizes:
        sigma[size], mean[size] = _distance(norm, pooled)
        pooled = pooled_pairs(pooled)
    # Every image has the same number of positions.
    centre, spread = of_images.mean.mean(0), of_images.mean.var(0, correction=0)
    everything = Moments(count=of_images.count, mean=centre, var=of_images.var.mean(0) + spread)
    stale_sigma, stale_mean = _distance(norm, everything)
    layer = int(name.split(".")[1])
    return LayerGap(
        layer=layer,
        name=_describe(network.layers[layer]),
        channels=len(centre),
        sigma=sigma,
        mean=mean,
        stale_sigma=stale_sigma,
        stale_mean=stale_mean,
    )


def _distance(norm: nn.Module, moments: Moments) -> tuple[float, float]:
    """Return the root mean squares of sigma / sigma_pop - 1 and (mu - mu_pop) / sigma_pop."""
    used = as_used(norm, moments)
    ratio, shift = gaps(norm, used.mean, used.var)
    return _root_mean_square(ratio), _root_mean_square(shift)


def gaps(norm: nn.Module, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return sigma / sigma_pop - 1 and (mu - mu_pop) / sigma_pop by channel, against the norm's running statistics."""
    running, eps = running_moments(norm), float(norm.eps)  # type: ignore[arg-type]
    sigma_pop = torch.sqrt(running.var + eps)
    return torch.sqrt(var + eps) / sigma_pop - 1, (mean - running.mean) / sigma_pop


def _root_mean_square(values: Tensor) -> float:
    return math.sqrt(values.double().square().mean().item())


def _describe(block: nn.Module) -> str:
    """Return such as "conv 3x3/2"."""
    conv = block.conv
    assert isinstance(conv, nn.Conv2d)
    height, width = conv.kernel_size
    return f"conv {height}x{width}" + (f"/{conv.stride[0]}" if conv.stride[0] > 1 else "")
