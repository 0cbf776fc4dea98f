"""The layers that resample the grid: [upsample] and [reorg3d].

Keys, defaults and geometry: darknet `parser.c`, `upsample_layer.c` and `blas.c` (reorg_cpu).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfg.parse import Section
from cfg.spec import LayerSpec, Shape, ShapeError, key, read_keys

MAX_STRIDE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class UpsampleSpec(LayerSpec):
    """Nearest-neighbour upsampling by `stride`; all values are multiplied by `scale`.

    A negative stride downsamples: each block of |stride| x |stride| cells becomes its sum.
    """

    kind: ClassVar[str] = "upsample"

    stride: int = key(2, low=-MAX_STRIDE, high=MAX_STRIDE)
    scale: float = key(1.0)

    @classmethod
    def read(cls, section: Section) -> UpsampleSpec:
        spec = cls(**read_keys(cls, section))
        if spec.stride == 0:
            raise section.error("stride=0 makes no output", "stride")
        return spec

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        channels, height, width = inputs[0]
        if self.stride > 0:
            return Shape(channels, height * self.stride, width * self.stride)
        _check_divisible(inputs[0], -self.stride)
        return Shape(channels, height // -self.stride, width // -self.stride)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reorg3dSpec(LayerSpec):
    """Space to depth: out[k, y, x] = in[k mod C, y*s + (k div C) div s, x*s + (k div C) mod s]."""

    kind: ClassVar[str] = "reorg3d"

    stride: int = key(1, low=1, high=MAX_STRIDE)

    @classmethod
    def read(cls, section: Section) -> Reorg3dSpec:
        section.refuse_unless(reverse=0)
        return cls(**read_keys(cls, section))

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        channels, height, width = inputs[0]
        _check_divisible(inputs[0], self.stride)
        return Shape(channels * self.stride**2, height // self.stride, width // self.stride)


def _check_divisible(shape: Shape, stride: int) -> None:
    if shape.height % stride or shape.width % stride:
        raise ShapeError(f"stride={stride} does not divide {shape}")


SPECS = (UpsampleSpec, Reorg3dSpec)
