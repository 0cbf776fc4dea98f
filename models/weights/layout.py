"""Layout of a darknet .weights file: the arrays of each layer of a plan, in file order.

Source: darknet `parser.c`, save_convolutional_weights, save_shortcut_weights and load_weights_upto. There are no
names, no shapes and no layer count in the file: they all follow from the cfg.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cfg.convolution import ConvSpec
from cfg.plan import Node, Plan
from cfg.wiring import ShortcutSpec
from utils.errors import UserError

EPS = 1e-5  # what darknet adds to a variance, inside the root

# Not read for a layer with dontloadscales=1, which gets the values of an untrained network.
FRESH_SCALES = {"scales": 1.0, "rolling_mean": 0.0, "rolling_variance": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredArray:
    """An array of float32 values in C order. name: in the state dict of a Network with batch norm; word: darknet's."""

    name: str
    word: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def fault_of(self, values: np.ndarray) -> str:
        """Return what is impossible in `values`, such as "rolling_variance[3] is -0.5", or an empty string."""
        wrong = ~np.isfinite(values)
        if self.word == "rolling_variance":
            wrong |= values < 0
        if not wrong.any():
            return ""
        first = int(wrong.argmax())
        return f"{self.word}[{first}] is {values.flat[first]:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLayer:
    """One layer of the file. arrays: all that darknet writes; loaded: those that it reads for this cfg."""

    node: Node
    arrays: tuple[StoredArray, ...]
    loaded: tuple[StoredArray, ...]

    @property
    def loaded_bytes(self) -> int:
        return 4 * sum(array.size for array in self.loaded)


def place(plan: Plan, node: Node) -> str:
    """layer 12 [convolutional] (yolov4.cfg:96)"""
    return f"layer {node.index} [{node.spec.kind}] ({plan.path}:{node.line})"


def stored_layers(plan: Plan) -> tuple[StoredLayer, ...]:
    """Return the layers that have arrays in the file. Raises UserError for one of unknown layout."""
    layers = []
    for node in plan.nodes:
        arrays = ARRAYS.get(type(node.spec), _nothing)(node)
        if not arrays and node.parameter_count:
            raise UserError(f"{place(plan, node)}: where darknet stores its weights is not known")
        if arrays:
            layers.append(StoredLayer(node=node, arrays=arrays, loaded=_loaded(node, arrays)))
    return tuple(layers)


def _loaded(node: Node, arrays: tuple[StoredArray, ...]) -> tuple[StoredArray, ...]:
    if not isinstance(node.spec, ConvSpec):
        return arrays
    if node.spec.dontload:
        return ()
    return tuple(array for array in arrays if not (node.spec.dontloadscales and array.word in FRESH_SCALES))


def _convolution(node: Node) -> tuple[StoredArray, ...]:
    spec = node.spec
    assert isinstance(spec, ConvSpec)
    layer, filters = f"layers.{node.index}", (spec.filters,)
    kernel = (spec.filters, node.input_shapes[0].channels // spec.groups, spec.size, spec.size)
    weights = StoredArray(name=f"{layer}.conv.weight", word="weights", shape=kernel)
    if not spec.batch_normalize:
        return StoredArray(name=f"{layer}.conv.bias", word="biases", shape=filters), weights
    return (
        StoredArray(name=f"{layer}.norm.bias", word="biases", shape=filters),
        StoredArray(name=f"{layer}.norm.weight", word="scales", shape=filters),
        StoredArray(name=f"{layer}.norm.running_mean", word="rolling_mean", shape=filters),
        StoredArray(name=f"{layer}.norm.running_var", word="rolling_variance", shape=filters),
        weights,
    )


def _shortcut(node: Node) -> tuple[StoredArray, ...]:
    """Return one weight per input, or per input and channel; the previous layer is input 0."""
    spec = node.spec
    assert isinstance(spec, ShortcutSpec)
    if spec.weights_type == "none":
        return ()
    per_channel = (node.input_shapes[0].channels,) if spec.weights_type == "per_channel" else ()
    shape = (len(node.inputs), *per_channel)
    return (StoredArray(name=f"layers.{node.index}.weight", word="weights", shape=shape),)


def _nothing(node: Node) -> tuple[StoredArray, ...]:
    return ()


ARRAYS: dict[type, Callable[[Node], tuple[StoredArray, ...]]] = {ConvSpec: _convolution, ShortcutSpec: _shortcut}
