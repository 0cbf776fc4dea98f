"""The pooling layers: [maxpool], [local_avgpool] and [avgpool].

Keys, defaults and geometry: darknet `parser.c` and `maxpool_layer.c`, `avgpool_layer.c`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfg.parse import Section
from cfg.spec import (
    MAX_CHANNELS,
    MAX_WINDOW,
    LayerSpec,
    Shape,
    ShapeError,
    blurred,
    check_extent,
    key,
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
    def read(cls, section: Section) -> LayerSpec:
        """Read a PoolSpec, or with maxpool_depth=1 a DepthPoolSpec. Raises CfgError."""
        geometry = _read_geometry(section)
        antialiasing = section.integer("antialiasing", 0, high=2)
        out_channels = section.integer("out_channels", 1, low=1, high=MAX_CHANNELS)
        if section.integer("maxpool_depth", 0):
            section.refuse_unless(antialiasing=0)
            return DepthPoolSpec(out_channels=out_channels)
        return cls(**geometry, antialiasing=antialiasing)

    @property
    def pool_strides(self) -> tuple[int, int]:
        """Strides (y, x) of the pooling itself, without the blur."""
        return (1, 1) if self.antialiasing else (self.stride_y, self.stride_x)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        sharp = _window_shape(inputs[0], self.size, self.padding, self.pool_strides)
        return blurred(sharp, self.antialiasing, stride_x=self.stride_x, stride_y=self.stride_y)


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthPoolSpec(LayerSpec):
    """Max pooling over channels: output channel g is the maximum of the input channels g, g + out_channels, ..."""

    kind: ClassVar[str] = "maxpool"

    out_channels: int

    @classmethod
    def read(cls, section: Section) -> LayerSpec:
        return PoolSpec.read(section)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        if self.out_channels > inputs[0].channels:
            raise ShapeError(f"out_channels={self.out_channels} is more than the {inputs[0].channels} channels")
        return inputs[0]._replace(channels=self.out_channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalAvgPoolSpec(LayerSpec):
    """Average pooling that ignores the padding, which is that of [maxpool]."""

    kind: ClassVar[str] = "local_avgpool"

    size: int
    stride_x: int
    stride_y: int
    padding: int

    @classmethod
    def read(cls, section: Section) -> LocalAvgPoolSpec:
        return cls(**_read_geometry(section))

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return _window_shape(inputs[0], self.size, self.padding, (self.stride_y, self.stride_x))


@dataclass(frozen=True, kw_only=True, slots=True)
class AvgPoolSpec(LayerSpec):
    """Global average pooling."""

    kind: ClassVar[str] = "avgpool"

    @classmethod
    def read(cls, section: Section) -> AvgPoolSpec:
        return cls()

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return Shape(inputs[0].channels, 1, 1)


def _read_geometry(section: Section) -> dict[str, int]:
    """Return size, strides and padding; the default of each depends on the one before."""
    strides = read_strides(section)
    size = section.integer("size", section.integer("stride", 1), low=1, high=MAX_WINDOW)
    # With more padding some window would hold nothing else.
    padding = section.integer("padding", size - 1, high=2 * (size - 1))
    return {"size": size, "padding": padding, **strides}


def _window_shape(shape: Shape, size: int, padding: int, strides: tuple[int, int]) -> Shape:
    padded = Shape(shape.channels, shape.height + padding, shape.width + padding)
    check_extent(padded)
    return Shape(
        channels=shape.channels,
        height=window_count(padded.height, size, strides[0]),
        width=window_count(padded.width, size, strides[1]),
    )
