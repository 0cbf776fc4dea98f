"""The layers whose output has the shape of their input.

Keys and defaults: darknet `parser.c`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfg.parse import Section
from cfg.spec import ACTIVATIONS, LayerSpec, Shape, ShapeError, key, read_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSpec(LayerSpec):
    """Separate activation."""

    kind: ClassVar[str] = "activation"

    activation: str = key("linear", choices=ACTIVATIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class DropoutSpec(LayerSpec):
    """Dropout of single cells with `probability`, in training only."""

    kind: ClassVar[str] = "dropout"

    probability: float = key(0.2, low=0, high=1)

    @classmethod
    def read(cls, section: Section) -> DropoutSpec:
        section.warn_unless(dropblock=0, dropblock_size_rel=0, dropblock_size_abs=0)
        return cls(**read_keys(cls, section))


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxSpec(LayerSpec):
    """Softmax over each of `groups` equal slices of an image's values, flattened from (C, H, W)."""

    kind: ClassVar[str] = "softmax"

    groups: int = key(1, low=1)
    temperature: float = key(1.0, low=1e-6)

    @classmethod
    def read(cls, section: Section) -> SoftmaxSpec:
        section.refuse_unless(spatial=0, tree="")
        section.ignore("noloss")
        return cls(**read_keys(cls, section))

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        channels, height, width = inputs[0]
        if channels * height * width % self.groups:
            raise ShapeError(f"groups={self.groups} does not divide the values of {inputs[0]}")
        return inputs[0]


SPECS = (ActivationSpec, DropoutSpec, SoftmaxSpec)
