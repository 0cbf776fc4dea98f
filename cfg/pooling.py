"""The pooling layers: [maxpool] and [avgpool].

Keys, defaults and geometry: darknet `parser.c` and `maxpool_layer.c`, `avgpool_layer.c`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfg.parse import Section
from cfg.spec import MAX_WINDOW, LayerSpec, Shape, WindowSpec, key, read_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSpec(WindowSpec):
    """Max pooling.

    padding: total number of cells per axis, padding // 2 of them left and above, the rest right and below; they are
    never the maximum.
    """

    kind: ClassVar[str] = "maxpool"

    size: int = key(1, fallback="stride", low=1, high=MAX_WINDOW)
    padding: int

    @classmethod
    def read(cls, section: Section) -> PoolSpec:
        values = read_keys(cls, section)
        margin = values["size"] - 1
        padding = section.integer("padding", margin, high=2 * margin)  # more would leave a window with padding only
        section.refuse_unless(maxpool_depth=0)
        section.ignore("out_channels")
        return cls(padding=padding, **values)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return self.window_shape(inputs[0], self.size, self.padding)


@dataclass(frozen=True, kw_only=True, slots=True)
class AvgPoolSpec(LayerSpec):
    """Global average pooling."""

    kind: ClassVar[str] = "avgpool"

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return Shape(inputs[0].channels, 1, 1)


SPECS = (PoolSpec, AvgPoolSpec)
