"""What every layer of a plan answers, and how its fields are read from cfg keys."""

from __future__ import annotations

import math
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
    """The extent of one feature map: channels, and rows and columns in cells."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


class ShapeError(ValueError):
    """A layer does not fit its inputs. The plan, which knows file and line, turns it into a CfgError."""


class LayerSpec(ABC):
    """One section of a cfg, as plain values. Subclasses are frozen dataclasses."""

    __slots__ = ()
    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def read(cls, section: Section) -> LayerSpec:
        """Raises CfgError."""

    @abstractmethod
    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        """`inputs` in the order of `sources`. Raises ShapeError."""

    def sources(self, index: int) -> tuple[int, ...]:
        """Absolute indices of the layers that the layer at `index` reads; -1 is the network's input."""
        return (index - 1,)

    def parameter_count(self, inputs: tuple[Shape, ...]) -> int:
        """Trained values; running statistics are not trained."""
        return 0

    def describe(self) -> str:
        """`field=value` of every field that is not at its default."""
        return " ".join(
            f"{f.name}={_plain(getattr(self, f.name))}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        )


def key(default: Any, name: str = "", **limits: Any) -> Any:
    """A dataclass field read from the cfg key `name` (or the field's own name).

    The default's type is the kind of value: bool, int, float, or str with `choices=` (and `unknown=`, as
    `Section.word`). A bare `int` in its place says that the key is required. `low=` and `high=` are inclusive limits.
    """
    metadata = {"key": name, "kind": default if default is int else type(default), "limits": limits}
    return field(metadata=metadata) if default is int else field(default=default, metadata=metadata)


def read_keys(spec_type: type[Any], section: Section) -> dict[str, Any]:
    """The values of all fields of `spec_type` declared with `key`. Raises CfgError."""
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
    """How many windows start within a padded side. Raises ShapeError where not even one fits."""
    if size_px < window_px:
        raise ShapeError(f"a window of {window_px} does not fit into a padded side of {size_px}")
    return (size_px - window_px) // stride_px + 1


def read_strides(section: Section) -> dict[str, int]:
    """stride_x and stride_y, for which `stride` speaks where they are silent. Raises CfgError."""
    stride = section.integer("stride", 1, low=1, high=MAX_WINDOW)
    return {axis: section.integer(axis, stride, low=1, high=MAX_WINDOW) for axis in ("stride_x", "stride_y")}


def blurred(sharp: Shape, antialiasing: int, *, stride_x: int, stride_y: int) -> Shape:
    """What antialiasing leaves of an output made with stride 1: its blur takes the strides instead."""
    if not antialiasing:
        return sharp
    size, padding = BLUR_WINDOWS[antialiasing]
    return Shape(
        channels=sharp.channels,
        height=window_count(sharp.height + 2 * padding, size, stride_y),
        width=window_count(sharp.width + 2 * padding, size, stride_x),
    )


def check_extent(shape: Shape) -> None:
    """Nothing absurd may reach an allocation. Raises ShapeError."""
    channels, height, width = shape
    if channels > MAX_CHANNELS or max(height, width) > MAX_SIDE_PX or channels * height * width > MAX_CELLS:
        raise ShapeError(f"{shape} is too large")


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(_plain(item) for item in value) if _nested(value) else ",".join(map(_plain, value))
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return "inf" if math.isinf(value) else f"{value:g}"
    return str(value)


def _nested(value: tuple[object, ...]) -> bool:
    return any(isinstance(item, tuple) for item in value)
