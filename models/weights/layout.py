"""Layout of a darknet .weights file: the arrays of each layer of a plan, in file order.

Source: darknet `parser.c`, save_convolutional_weights, save_shortcut_weights and load_weights_upto. There are no
names, no shapes and no layer count in the file: they all follow from the cfg.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cfg.convolution import ConvSpec
from cfg.plan import Node, Plan
from cfg.wiring import ShortcutSpec
from utils.errors import UserError

LARGEST = 1e20  # of a value; a flipped bit makes most of them far larger
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
        """Return what is impossible in `values`, such as "rolling_variance[3] is -0.5", or an empty string.

        Filters that are all 0 are: a file has them where a disk or a transfer lost its content.
        """
        if len(self.shape) == 4 and not values.any():
            return f"all {self.word} are 0"
        wrong = ~(np.abs(values) < LARGEST)  # NaN is not less, either
        if self.word == "rolling_variance":
            wrong |= values < 0
        if not wrong.any():
            return ""
        first = int(wrong.argmax())
        return f"{self.word}[{first}] is {values.flat[first]:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLayer:
    """One layer of the file. arrays: all that darknet writes."""

    node: Node
    arrays: tuple[StoredArray, ...]

    @property
    def loaded(self) -> tuple[StoredArray, ...]:
        """The arrays that darknet reads for this cfg."""
        spec = self.node.spec
        if not isinstance(spec, ConvSpec):
            return self.arrays
        skipped = FRESH_SCALES if spec.dontloadscales else ()
        return () if spec.dontload else tuple(array for array in self.arrays if array.word not in skipped)

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
        if arrays := _arrays(node):
            layers.append(StoredLayer(node=node, arrays=arrays))
        elif node.parameter_count:
            raise UserError(f"{place(plan, node)}: where darknet stores its weights is not known")
    return tuple(layers)


def _arrays(node: Node) -> tuple[StoredArray, ...]:
    layer, spec = f"layers.{node.index}", node.spec
    if isinstance(spec, ShortcutSpec) and spec.weights_type != "none":
        # One weight per input, or per input and channel; the previous layer is input 0.
        per_channel = (node.input_shapes[0].channels,) if spec.weights_type == "per_channel" else ()
        return (StoredArray(name=f"{layer}.weight", word="weights", shape=(len(node.inputs), *per_channel)),)
    if not isinstance(spec, ConvSpec):
        return ()
    kernel = (spec.filters, node.input_shapes[0].channels // spec.groups, spec.size, spec.size)
    names = {"conv.bias": "biases"}
    if spec.batch_normalize:
        names = {"norm.bias": "biases", "norm.weight": "scales"}
        names |= {"norm.running_mean": "rolling_mean", "norm.running_var": "rolling_variance"}
    return (
        *(StoredArray(name=f"{layer}.{name}", word=word, shape=(spec.filters,)) for name, word in names.items()),
        StoredArray(name=f"{layer}.conv.weight", word="weights", shape=kernel),
    )
