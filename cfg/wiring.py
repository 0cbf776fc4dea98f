"""The layers that read others by index: [route], [shortcut], [sam] and [scale_channels].

Keys, defaults and geometry: darknet `parser.c` and the `make_*_layer` function of each type. In a cfg a negative index
counts back from the layer that has it, any other is absolute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfg.parse import Section
from cfg.spec import ACTIVATIONS, MAX_CHANNELS, LayerSpec, Shape, ShapeError, key, read_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteSpec(LayerSpec):
    """Concatenation along channels of the group_id-th of `groups` equal slices of each of `layers`.

    layers: as written in the cfg.
    """

    kind: ClassVar[str] = "route"

    layers: tuple[int, ...]
    groups: int = key(1, low=1, high=MAX_CHANNELS)
    group_id: int = key(0, high=MAX_CHANNELS)

    @classmethod
    def read(cls, section: Section) -> RouteSpec:
        spec = cls(layers=section.integers("layers", required=True), **read_keys(cls, section))
        if spec.group_id >= spec.groups:
            raise section.error(f"group_id={spec.group_id} is not below groups={spec.groups}", "group_id")
        section.ignore("stream", "wait_stream")
        return spec

    def sources(self, index: int) -> tuple[int, ...]:
        return tuple(_absolute(layer, index) for layer in self.layers)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        _check_same_sides(inputs)
        for shape in inputs:
            if shape.channels % self.groups:
                raise ShapeError(f"groups={self.groups} does not divide {shape.channels} channels")
        return inputs[0]._replace(channels=sum(shape.channels // self.groups for shape in inputs))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortcutSpec(LayerSpec):
    """Sum of the previous layer and `layers` (cfg key `from`), then an activation.

    The output has the previous layer's shape: of a wider input only the first channels are added, and a narrower one is
    added to the first channels. weights_type: none, per_feature (one scalar per input) or per_channel.
    weights_normalization: none, relu or softmax over the inputs.
    """

    kind: ClassVar[str] = "shortcut"

    layers: tuple[int, ...]
    activation: str = key("linear", choices=ACTIVATIONS)
    weights_type: str = key("none", choices=("none", "per_feature", "per_layer", "per_channel"))
    weights_normalization: str = key("none", choices=("none", "relu", "avg_relu", "softmax"))

    @classmethod
    def read(cls, section: Section) -> ShortcutSpec:
        values = read_keys(cls, section)
        values["weights_type"] = values["weights_type"].replace("per_layer", "per_feature")
        values["weights_normalization"] = values["weights_normalization"].replace("avg_relu", "relu")
        if values["weights_type"] != "none":
            section.refuse_unless(dontload=0)
            section.warn_unless(learning_rate=1)
        return cls(layers=section.integers("from", required=True), **values)

    def sources(self, index: int) -> tuple[int, ...]:
        return (index - 1, *(_absolute(layer, index) for layer in self.layers))

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        _check_same_sides(inputs)
        return inputs[0]

    def parameter_count(self, inputs: tuple[Shape, ...]) -> int:
        per_input = {"none": 0, "per_feature": 1, "per_channel": inputs[0].channels}
        return len(inputs) * per_input[self.weights_type]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSpec(LayerSpec):
    """Base of the layers that combine the previous layer with `layer` (cfg key `from`)."""

    layer: int
    activation: str = key("linear", choices=ACTIVATIONS)

    @classmethod
    def read(cls, section: Section) -> PairSpec:
        layers = section.integers("from", required=True)
        if len(layers) != 1:
            raise section.error(f"[{section.name}] takes one layer in 'from'", "from")
        return cls(layer=layers[0], **read_keys(cls, section))

    def sources(self, index: int) -> tuple[int, ...]:
        return (index - 1, _absolute(self.layer, index))


@dataclass(frozen=True, kw_only=True, slots=True)
class SamSpec(PairSpec):
    """Spatial attention: the previous layer times `layer`, elementwise, then an activation."""

    kind: ClassVar[str] = "sam"

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        if inputs[0] != inputs[1]:
            raise ShapeError(f"[sam] needs equal shapes, got {inputs[0]} and {inputs[1]}")
        return inputs[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleChannelsSpec(PairSpec):
    """Squeeze and excitation: `layer` times the previous layer, then an activation.

    The previous layer is (C, 1, 1), or (1, H, W) with scale_wh, and is broadcast.
    """

    kind: ClassVar[str] = "scale_channels"

    scale_wh: bool = key(False)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        factor, scaled = inputs
        required = scaled._replace(channels=1) if self.scale_wh else Shape(scaled.channels, 1, 1)
        if factor != required:
            raise ShapeError(f"[scale_channels] needs {required} to scale {scaled}, got {factor}")
        return scaled


def _absolute(layer: int, index: int) -> int:
    # An index that counts back past the first layer must not become -1, the network's input.
    return layer if layer >= 0 else index + layer if index + layer >= 0 else -2


def _check_same_sides(inputs: tuple[Shape, ...]) -> None:
    for other in inputs:
        if other[1:] != inputs[0][1:]:
            raise ShapeError(f"inputs differ in height or width: {inputs[0]} and {other}")


SPECS = (RouteSpec, ShortcutSpec, SamSpec, ScaleChannelsSpec)
