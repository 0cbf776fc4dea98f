"""The layers that read the previous one, and the table of all layer types: the door to every spec.

Keys, defaults and geometry: darknet `parser.c` and the `make_*_layer` function of each type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfg.parse import Section
from cfg.spec import (
    ACTIVATIONS,
    MAX_CHANNELS,
    LayerSpec,
    Shape,
    ShapeError,
    key,
    read_keys,
    window_count,
)
from cfg.wiring import RouteSpec, SamSpec, ScaleChannelsSpec, ShortcutSpec
from cfg.yolo import YoloSpec

__all__ = [
    "LAYER_TYPES",
    "AvgPoolSpec",
    "ConvSpec",
    "DropoutSpec",
    "LayerSpec",
    "PoolSpec",
    "Reorg3dSpec",
    "RouteSpec",
    "SamSpec",
    "ScaleChannelsSpec",
    "Shape",
    "ShortcutSpec",
    "SoftmaxSpec",
    "UpsampleSpec",
    "YoloSpec",
    "read_layer",
]

MAX_WINDOW = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvSpec(LayerSpec):
    """padding: cells added on each side, dilation included. batch_normalize: 0 bias only, 1 BN, 2 CmBN."""

    kind: ClassVar[str] = "convolutional"

    filters: int = key(1, low=1, high=MAX_CHANNELS)
    size: int = key(1, low=1, high=MAX_WINDOW)
    stride_x: int = 1
    stride_y: int = 1
    padding: int = 0
    dilation: int = key(1, low=1, high=MAX_WINDOW)
    groups: int = key(1, low=1, high=MAX_CHANNELS)
    batch_normalize: int = key(0, high=2)
    activation: str = key("logistic", choices=ACTIVATIONS)

    @classmethod
    def read(cls, section: Section) -> ConvSpec:
        values = read_keys(cls, section)
        values["stride_x"], values["stride_y"] = _read_strides(section)
        padding = section.integer("padding", 0, high=MAX_WINDOW)
        padding = values["size"] // 2 if section.integer("pad", 0) else padding
        if values["size"] == 1:
            values["dilation"] = 1
        elif values["dilation"] > 1 and 2 * padding != values["size"] - 1:
            # darknet's output size ignores dilation, which is right for "same" padding only.
            raise section.error("dilation needs an odd size and pad=1", "dilation")
        values["padding"] = padding * values["dilation"]
        if section.integer("cbn", 0):
            values["batch_normalize"] = 2
        section.refuse(antialiasing=0, share_index="", flipped=0, reverse=0, coordconv=0, binary=0, xnor=0)
        section.refuse(bin_output=0, sway=0, rotate=0, stretch=0, stretch_sway=0, assisted_excitation=0)
        section.ignore_aloud(dot=0, grad_centr=0)
        section.ignore("angle", "stream", "wait_stream")
        return cls(**values)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        if inputs[0].channels % self.groups or self.filters % self.groups:
            raise ShapeError(
                f"groups={self.groups} does not divide both {inputs[0].channels} channels and {self.filters} filters"
            )
        window = self.dilation * (self.size - 1) + 1
        return Shape(
            channels=self.filters,
            height=window_count(inputs[0].height + 2 * self.padding, window, self.stride_y),
            width=window_count(inputs[0].width + 2 * self.padding, window, self.stride_x),
        )

    def parameter_count(self, inputs: tuple[Shape, ...]) -> int:
        kernel = inputs[0].channels // self.groups * self.size**2
        return self.filters * (kernel + (2 if self.batch_normalize else 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSpec(LayerSpec):
    """Max pooling.

    padding: cells of -inf in total; padding // 2 go left and above, the rest right and below.
    """

    kind: ClassVar[str] = "maxpool"

    size: int
    stride_x: int
    stride_y: int
    padding: int

    @classmethod
    def read(cls, section: Section) -> PoolSpec:
        stride_x, stride_y = _read_strides(section)
        size = section.integer("size", section.integer("stride", 1), low=1, high=MAX_WINDOW)
        # More padding than this, and some window would see nothing but padding.
        padding = section.integer("padding", size - 1, high=2 * (size - 1))
        section.refuse(maxpool_depth=0, antialiasing=0)
        section.ignore("out_channels")
        return cls(size=size, stride_x=stride_x, stride_y=stride_y, padding=padding)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return Shape(
            channels=inputs[0].channels,
            height=window_count(inputs[0].height + self.padding, self.size, self.stride_y),
            width=window_count(inputs[0].width + self.padding, self.size, self.stride_x),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class UpsampleSpec(LayerSpec):
    """Nearest neighbour, each cell becomes stride x stride cells."""

    kind: ClassVar[str] = "upsample"

    stride: int = key(2, low=1, high=64)

    @classmethod
    def read(cls, section: Section) -> UpsampleSpec:
        section.refuse(scale=1)
        return cls(**read_keys(cls, section))

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        channels, height, width = inputs[0]
        return Shape(channels, height * self.stride, width * self.stride)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reorg3dSpec(LayerSpec):
    """Space to depth: out[k, y, x] = in[k mod C, y*s + (k div C) div s, x*s + (k div C) mod s]."""

    kind: ClassVar[str] = "reorg3d"

    stride: int = key(1, low=1, high=64)

    @classmethod
    def read(cls, section: Section) -> Reorg3dSpec:
        section.refuse(reverse=0)
        return cls(**read_keys(cls, section))

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        channels, height, width = inputs[0]
        if height % self.stride or width % self.stride:
            raise ShapeError(f"stride={self.stride} does not divide {inputs[0]}")
        return Shape(channels * self.stride**2, height // self.stride, width // self.stride)


@dataclass(frozen=True, kw_only=True, slots=True)
class AvgPoolSpec(LayerSpec):
    """The mean over all cells of each channel."""

    kind: ClassVar[str] = "avgpool"

    @classmethod
    def read(cls, section: Section) -> AvgPoolSpec:
        return cls()

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return Shape(inputs[0].channels, 1, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DropoutSpec(LayerSpec):
    """Zeroes cells with `probability` in training and rescales the others; nothing in inference."""

    kind: ClassVar[str] = "dropout"

    probability: float = key(0.2, low=0, high=1)

    @classmethod
    def read(cls, section: Section) -> DropoutSpec:
        section.ignore_aloud(dropblock=0, dropblock_size_rel=0, dropblock_size_abs=0)
        return cls(**read_keys(cls, section))

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return inputs[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxSpec(LayerSpec):
    """Softmax over all values of an image: the end of a classifier."""

    kind: ClassVar[str] = "softmax"

    temperature: float = key(1.0, low=1e-6)

    @classmethod
    def read(cls, section: Section) -> SoftmaxSpec:
        section.refuse(groups=1, spatial=0, noloss=0, tree="")
        return cls(**read_keys(cls, section))

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return inputs[0]


_SPECS: tuple[type[LayerSpec], ...] = (
    *(ConvSpec, RouteSpec, ShortcutSpec, PoolSpec, UpsampleSpec, YoloSpec),
    *(SamSpec, ScaleChannelsSpec, Reorg3dSpec, AvgPoolSpec, DropoutSpec, SoftmaxSpec),
)
LAYER_TYPES: dict[str, type[LayerSpec]] = {spec.kind: spec for spec in _SPECS}


def read_layer(section: Section) -> LayerSpec:
    """Raises CfgError, also for a section name that is not in LAYER_TYPES."""
    if section.name not in LAYER_TYPES:
        raise section.error(f"[{section.name}] is not supported, only {', '.join(sorted(LAYER_TYPES))} are")
    section.refuse(dontload=0, dontloadscales=0)
    section.ignore_aloud(clip=0, onlyforward=0, dont_update=0, burnin_update=0, stopbackward=0)
    section.ignore_aloud(train_only_bn=0)
    return LAYER_TYPES[section.name].read(section)


def _read_strides(section: Section) -> tuple[int, int]:
    stride = section.integer("stride", 1, low=1, high=MAX_WINDOW)
    stride_x = section.integer("stride_x", stride, low=1, high=MAX_WINDOW)
    return stride_x, section.integer("stride_y", stride, low=1, high=MAX_WINDOW)
