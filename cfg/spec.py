"""The interface of every layer of a plan, and how its fields are read from cfg keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, field, fields
from typing import Any, ClassVar, NamedTuple

from cfg.parse import Section

ACTIVATIONS = (
    *("linear", "leaky", "mish", "swish", "logistic", "relu"),
    *("relu6", "elu", "selu", "gelu", "tanh", "hard_mish", "hardtan"),
)
BLUR_WINDOWS = {1: (3, 1), 2: (2, 0)}  # antialiasing -> (size, padding on each side)
MAX_CELLS = 2**30  # of one layer's output for one image: 4 GiB in float32
MAX_CHANNELS = 65_536
MAX_SIDE_PX = 32_768
MAX_WINDOW = 1024


class Shape(NamedTuple):
    """Shape (C, H, W) of one feature map, in cells."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


class ShapeError(ValueError):
    """A layer that does not fit its inputs. The plan, which knows file and line, turns it into a CfgError."""


class LayerSpec(ABC):
    """One section of a cfg as plain values. Subclasses are frozen dataclasses."""

    __slots__ = ()
    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def read(cls, section: Section) -> LayerSpec:
        """Read the section. Raises CfgError."""

    @abstractmethod
    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        """Return the output's shape for `inputs`, in the order of `sources`. Raises ShapeError."""

    def sources(self, index: int) -> tuple[int, ...]:
        """Return absolute indices of the layers that the layer at `index` reads; -1 is the network's input."""
        return (index - 1,)

    def parameter_count(self, inputs: tuple[Shape, ...]) -> int:
        """Return the number of trained values; running statistics are not trained."""
        return 0


def key(default: Any, name: str = "", **limits: Any) -> Any:
    """Return a dataclass field that is read from the cfg key `name` (default: the field's name).

    The default's type is the value's type: bool, int, float, or str with `choices=` (and `unknown=`, see
    `Section.word`). `int` itself in place of a default makes the key required. `low=` and `high=` are inclusive limits.
    """
    metadata = {"key": name, "kind": default if default is int else type(default), "limits": limits}
    return field(metadata=metadata) if default is int else field(default=default, metadata=metadata)


def read_keys(spec_type: type[Any], section: Section) -> dict[str, Any]:
    """Return the values of all fields of `spec_type` declared with `key`. Raises CfgError."""
    values: dict[str, Any] = {}
    for f in fields(spec_type):
        if "kind" not in f.metadata:
            continue
        name, kind, limits = f.metadata["key"] or f.name, f.metadata["kind"], f.metadata["limits"]
        default: Any = None if f.default is MISSING else f.default
        if kind is bool:
            values[f.name] = section.integer(name, int(default)) != 0
        elif kind is int:
            values[f.name] = section.integer(name, default, **limits)
        elif kind is float:
            values[f.name] = section.number(name, default, **limits)
        else:
            values[f.name] = section.word(name, default, **limits)
    return values


def window_count(size_px: int, window_px: int, stride_px: int) -> int:
    """Return how many windows fit into a padded side. Raises ShapeError if none does."""
    if size_px < window_px:
        raise ShapeError(f"a window of {window_px} does not fit into a padded side of {size_px}")
    return (size_px - window_px) // stride_px + 1


def read_strides(section: Section) -> dict[str, int]:
    """Return stride_x and stride_y, each with `stride` as its default. Raises CfgError."""
    stride = section.integer("stride", 1, low=1, high=MAX_WINDOW)
    return {axis: section.integer(axis, stride, low=1, high=MAX_WINDOW) for axis in ("stride_x", "stride_y")}


def blurred(sharp: Shape, antialiasing: int, *, stride_x: int, stride_y: int) -> Shape:
    """Return the shape after the blur of antialiasing, which applies the strides to an output of stride 1."""
    if not antialiasing:
        return sharp
    size, padding = BLUR_WINDOWS[antialiasing]
    return Shape(
        channels=sharp.channels,
        height=window_count(sharp.height + 2 * padding, size, stride_y),
        width=window_count(sharp.width + 2 * padding, size, stride_x),
    )


def check_extent(shape: Shape) -> None:
    """Raise ShapeError for a shape too large to allocate."""
    channels, height, width = shape
    if channels > MAX_CHANNELS or max(height, width) > MAX_SIDE_PX or channels * height * width > MAX_CELLS:
        raise ShapeError(f"{shape} is too large")
