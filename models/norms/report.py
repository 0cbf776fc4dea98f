"""How far the statistics of mini-batches are from the population's, layer by layer.

One pass in eval mode takes the moments of every image at every norm; those of mini-batches are pooled from them
(Chan et al.). So each layer's input has been normalized by population statistics, and what is measured is the
layer's own noise, not what it inherits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.network import Network
from models.norms.effective_batch import said_images
from models.norms.moments import Moments
from models.norms.running_stats import as_used, eval_mode, norms_with_statistics, pixels_for, watched
from utils.errors import UserError

SIZES = (1, 2, 4, 8, 16)
LARGE = 0.3  # a gap that the verdict names


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGap:
    """Of one norm; pop are its running statistics, sigma the root of variance + eps.

    sigma, mean: mini-batch size -> root mean square, over channels and mini-batches, of sigma_b / sigma_pop - 1 and
    of (mu_b - mu_pop) / sigma_pop. stale_sigma, stale_mean: the same of all images together.
    """

    layer: int
    name: str
    channels: int
    sigma: dict[int, float]
    mean: dict[int, float]
    stale_sigma: float
    stale_mean: float

    def at(self, size: int) -> float:
        """The larger of the two gaps of mini-batches of `size`."""
        return max(self.sigma[size], self.mean[size])

    @property
    def stale(self) -> float:
        """The larger of the two gaps of all images together."""
        return max(self.stale_sigma, self.stale_mean)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormReport:
    """layers in order of the cfg; sizes: the mini-batch sizes that `images` images make at least one of."""

    layers: tuple[LayerGap, ...]
    sizes: tuple[int, ...]
    images: int

    def table(self) -> str:
        """Gaps in per cent, a row a layer."""
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
        """What the table says of a training with such mini-batches, whose statistics were of `effective` images.

        effective None: it did not normalize by statistics of mini-batches.
        """
        lines = [self._at(mini_batch, f"mini-batches of {said_images(mini_batch)}")]
        if effective is not None and effective != mini_batch:
            lines.append(self._at(effective, f"{said_images(effective)} pooled"))
        is_stale = any(gap.stale > LARGE for gap in self.layers)
        lines.append(
            f"running statistics against these {self.images} images: {self._worst(lambda gap: gap.stale)}"
            + ("; evaluate.py --recalibrate-on replaces them" if is_stale else "")
        )
        return "\n".join(lines)

    def _at(self, images: int, said: str) -> str:
        size = max(size for size in self.sizes if size <= max(images, 1))
        measured = "" if size == images else f" (measured at {size})"
        return f"{said}{measured}: {self._worst(lambda gap: gap.at(size))}"

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
    """batches: images (N, 3, H, W) of one size, uint8 or float in 0..1, in random order: neighbours are pooled.

    UserError for a network without batch statistics, and where there is no image.
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
    """mean, var (n, C), all of one count -> (n // 2, C): each two neighbours as one."""
    even = len(moments.mean) // 2 * 2
    first, second = (
        Moments(count=moments.count, mean=moments.mean[start:even:2], var=moments.var[start:even:2]) for start in (0, 1)
    )
    return first.merged_with(second)


def _moments_of_images(network: Network, norms: dict[str, nn.Module], batches: Sequence[Tensor]) -> dict[str, Moments]:
    """By the norm's name, in the order of layers: count () positions of an image, mean and var (images, C)."""
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
    """y (N, C, H, W) -> mean, var (N, C)."""
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
        name=_describe(network.layers[layer].conv),
        channels=len(centre),
        sigma=sigma,
        mean=mean,
        stale_sigma=stale_sigma,
        stale_mean=stale_mean,
    )


def _distance(norm: nn.Module, moments: Moments) -> tuple[float, float]:
    """Root mean squares of sigma / sigma_pop - 1 and (mu - mu_pop) / sigma_pop."""
    used = as_used(norm, moments)
    sigma_pop = torch.sqrt(norm.running_var + norm.eps)
    ratio = torch.sqrt(used.var + norm.eps) / sigma_pop - 1
    shift = (used.mean - norm.running_mean) / sigma_pop
    return tuple(math.sqrt(value.double().square().mean().item()) for value in (ratio, shift))


def _describe(conv: nn.Conv2d) -> str:
    """conv 3x3/2"""
    height, width = conv.kernel_size
    return f"conv {height}x{width}" + (f"/{conv.stride[0]}" if conv.stride[0] > 1 else "")
