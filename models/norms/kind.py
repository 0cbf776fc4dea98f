"""What there is to know of a norm by its name, for the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from models.norms.table import NormOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class NormKind:
    """One norm of the table.

    make: convolution and resolved options -> the layer; None for a bias instead.
    knobs: settings that only some norms read, with their defaults for this one.
    gradients: what `norm_gradient` may be.
    images: options, images of a mini-batch and subdivisions -> how many images its statistics in training are
    of, where they are pooled the most; one of the functions below. None where no mini-batch's are used: then `words`
    says what is.
    """

    make: Callable[[nn.Conv2d, NormOptions], nn.Module | None]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    gradients: Sequence[str] = ()
    images: Callable[[NormOptions, int, int], float] | None = None
    words: str = "each image by its own"

    @property
    def sees_only_its_mini_batch(self) -> bool:
        """Whether nothing but the mini-batch at hand normalizes it in training. Several GPUs are not looked at."""
        return self.images is of_mini_batch


def of_mini_batch(options: NormOptions, mini_batch: int, subdivisions: int) -> float:
    return mini_batch


def of_batch(options: NormOptions, mini_batch: int, subdivisions: int) -> float:
    return mini_batch * subdivisions


def of_window(options: NormOptions, mini_batch: int, subdivisions: int) -> float:
    return mini_batch * (options.norm_window or subdivisions)


def of_average(options: NormOptions, mini_batch: int, subdivisions: int) -> float:
    return options.norm_average_images


def of_running_average(options: NormOptions, mini_batch: int, subdivisions: int) -> float:
    """The time constant of an exponential average of batches; without one it averages all of them."""
    return mini_batch * subdivisions / max(options.norm_momentum, 1e-3)
