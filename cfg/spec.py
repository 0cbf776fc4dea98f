"""The interface of every layer of a plan, and how its fields are read from cfg keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
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
READERS: dict[type, Callable[..., Any]] = {
    bool: Section.flag,
    int: Section.integer,
    float: Section.number,
    str: Section.word,
}


class Shape(NamedTuple):
    """Shape (C, H, W) of one feature map, in cells."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


class ShapeError(ValueError):
    """A layer that does not fit its inputs. The plan, which knows file and line, turns it into a CfgError."""


class LayerSpec:
    """One section of a cfg as plain values. Subclasses are frozen dataclasses."""

    __slots__ = ()
    kind: ClassVar[str]

    @classmethod
    def read(cls, section: Section) -> LayerSpec:
        """Read the section. Raises CfgError."""
        return cls(**read_keys(cls, section))

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        """Return the output's shape, by default the first of `inputs` (in `sources` order). Raises ShapeError."""
        return inputs[0]

    def sources(self, index: int) -> tuple[int, ...]:
        """Return absolute indices of the layers that the layer at `index` reads; -1 is the network's input."""
        return (index - 1,)

    def parameter_count(self, inputs: tuple[Shape, ...]) -> int:
        """Return the number of trained values; running statistics are not trained."""
        return 0


def key(default: Any, name: str = "", **limits: Any) -> Any:
    """Return a dataclass field that is read from the cfg key `name` (default: the field's name).

    The default's type is the value's type: bool, int, float or str. `int` itself in place of a default makes the key
    required. `limits` are the keyword arguments of the reader in `READERS`.
    """
    metadata = {"key": name, "kind": default if default is int else type(default), "limits": limits}
    return field(metadata=metadata) if default is int else field(default=default, metadata=metadata)


def read_keys(spec_type: type[Any], section: Section) -> dict[str, Any]:
    """Return the values of all fields of `spec_type` declared with `key`. Raises CfgError."""
    values: dict[str, Any] = {}
    for f in fields(spec_type):
        if "kind" not in f.metadata:
            continue
        read, name = READERS[f.metadata["kind"]], f.metadata["key"] or f.name
        values[f.name] = read(section, name, None if f.default is MISSING else f.default, **f.metadata["limits"])
    return values


def check_extent(shape: Shape) -> None:
    """Raise ShapeError for a shape too large to allocate."""
    channels, height, width = shape
    if channels > MAX_CHANNELS or max(height, width) > MAX_SIDE_PX or channels * height * width > MAX_CELLS:
        raise ShapeError(f"{shape} is too large")


def slide(shape: Shape, window: int, strides: tuple[int, int], padding: int) -> Shape:
    """Return the shape after a window with `strides` (y, x); padding: in total per axis. Raises ShapeError."""
    padded = shape._replace(height=shape.height + padding, width=shape.width + padding)
    check_extent(padded)
    side = min(padded.height, padded.width)
    if side < window:
        raise ShapeError(f"a window of {window} does not fit into a padded side of {side}")
    height, width = (padded.height - window) // strides[0] + 1, (padded.width - window) // strides[1] + 1
    return padded._replace(height=height, width=width)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSpec(LayerSpec):
    """Base of the layers with a moving window.

    antialiasing: 1 blurs the output with the 3x3 binomial filter, 2 with the mean of 2x2 cells; the window then has
    stride 1 and the blur has the strides.
    """

    stride_x: int = key(1, fallback="stride", low=1, high=MAX_WINDOW)
    stride_y: int = key(1, fallback="stride", low=1, high=MAX_WINDOW)
    antialiasing: int = key(0, high=2)

    @property
    def window_strides(self) -> tuple[int, int]:
        """Strides (y, x) of the window itself, without the blur."""
        return (1, 1) if self.antialiasing else (self.stride_y, self.stride_x)

    def window_shape(self, shape: Shape, window: int, padding: int) -> Shape:
        """Return the shape after window and blur; padding: in total per axis. Raises ShapeError."""
        output = slide(shape, window, self.window_strides, padding)
        if not self.antialiasing:
            return output
        size, border = BLUR_WINDOWS[self.antialiasing]
        return slide(output, size, (self.stride_y, self.stride_x), 2 * border)
