"""Group norm and its two extremes, layer and instance norm (Wu & He 2018): each image by its own statistics.

They do the same in training and inference and at every mini-batch size, so they stay in the network at inference.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models.norms.spec import NormSpec
from utils.knob import knob


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedSpec(NormSpec):
    """A norm that uses statistics of groups of channels of each image."""

    has_image_statistics = True
    weight_options = ("groups",)

    groups: int = knob(32, "groups of channels; where they do not divide a layer's, its largest divisor below", low=1)

    def values_per_statistic(self, channels: int, positions: int, *, mini_batch: int) -> int:
        return channels // largest_divisor(channels, at_most=self.groups) * positions


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupNormSpec(GroupedSpec):
    """Statistics of groups of channels of one image."""

    name = "gn"
    summary = "statistics of groups of channels of each image"
    source = "Wu, He. Group Normalization. ECCV 2018, arXiv:1803.08494"
    has_batch_statistics = False
    has_running_statistics = False

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        return nn.GroupNorm(largest_divisor(conv.out_channels, at_most=self.groups), conv.out_channels, eps=eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNormSpec(NormSpec):
    """One group: statistics over channels and positions of one image (section 3.1)."""

    name = "ln"
    summary = "statistics of all channels of each image"
    source = GroupNormSpec.source
    has_batch_statistics = False
    has_running_statistics = False
    has_image_statistics = True

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        return nn.GroupNorm(1, conv.out_channels, eps=eps)

    def values_per_statistic(self, channels: int, positions: int, *, mini_batch: int) -> None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceNormSpec(NormSpec):
    """One channel a group. Not nn.InstanceNorm2d, whose affine part is off by default and named otherwise."""

    name = "in"
    summary = "statistics of each channel of each image"
    source = GroupNormSpec.source
    has_batch_statistics = False
    has_running_statistics = False
    has_image_statistics = True

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        return nn.GroupNorm(conv.out_channels, conv.out_channels, eps=eps)

    def values_per_statistic(self, channels: int, positions: int, *, mini_batch: int) -> int:
        return positions


def largest_divisor(number: int, *, at_most: int) -> int:
    """Return the largest divisor of `number` that is <= at_most, at least 1."""
    return next(d for d in range(min(number, max(at_most, 1)), 0, -1) if number % d == 0)


SPECS: tuple[type[NormSpec], ...] = (GroupNormSpec, LayerNormSpec, InstanceNormSpec)
