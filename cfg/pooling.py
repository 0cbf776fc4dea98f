"""The pooling layers: [maxpool] and [avgpool].

Keys, defaults and geometry: darknet `parser.c` and `maxpool_layer.c`, `avgpool_layer.c`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfg.parse import Section
from cfg.spec import (
    MAX_WINDOW,
    LayerSpec,
    Shape,
    blurred,
    check_extent,
    key,
    read_keys,
    read_strides,
    window_count,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSpec(LayerSpec):
    """Max pooling.

    padding: total number of cells per axis, padding // 2 of them left and above, the rest right and below; they are
    never the maximum. antialiasing: see ConvSpec.
    """

    kind: ClassVar[str] = "maxpool"

    size: int
    stride_x: int
    stride_y: int
    padding: int
    antialiasing: int = key(0, high=2)

    @classmethod
    def read(cls, section: Section) -> PoolSpec:
        strides = read_strides(section)
        size = section.integer("size", section.integer("stride", 1), low=1, high=MAX_WINDOW)
        # With more padding some window would hold nothing else.
        padding = section.integer("padding", size - 1, high=2 * (size - 1))
        section.refuse_unless(maxpool_depth=0)
        section.ignore("out_channels")
        return cls(**read_keys(cls, section), **strides, size=size, padding=padding)

    @property
    def pool_strides(self) -> tuple[int, int]:
        """Strides (y, x) of the pooling itself, without the blur."""
        return (1, 1) if self.antialiasing else (self.stride_y, self.stride_x)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        channels, height, width = inputs[0]
        padded = Shape(channels, height + self.padding, width + self.padding)
        check_extent(padded)
        sharp = Shape(
            channels=channels,
            height=window_count(padded.height, self.size, self.pool_strides[0]),
            width=window_count(padded.width, self.size, self.pool_strides[1]),
        )
        return blurred(sharp, self.antialiasing, stride_x=self.stride_x, stride_y=self.stride_y)


@dataclass(frozen=True, kw_only=True, slots=True)
class AvgPoolSpec(LayerSpec):
    """Global average pooling."""

    kind: ClassVar[str] = "avgpool"

    @classmethod
    def read(cls, section: Section) -> AvgPoolSpec:
        return cls()

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return Shape(inputs[0].channels, 1, 1)


SPECS = (PoolSpec, AvgPoolSpec)
