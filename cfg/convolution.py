"""The [convolutional] section.

Keys, defaults and geometry: darknet `parser.c` (parse_convolutional) and `convolutional_layer.c`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfg.parse import Section
from cfg.spec import ACTIVATIONS, MAX_CHANNELS, MAX_WINDOW, Shape, ShapeError, WindowSpec, key, read_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvSpec(WindowSpec):
    """Convolution with a bias or a norm, then an activation.

    padding: cells added on each side, dilation included. batch_normalize: 0 bias only, 1 BN, 2 CmBN. antialiasing:
    blurs after the activation. dontload, dontloadscales: a .weights file has nothing for this layer, or neither gammas
    nor statistics. learning_rate: a factor on the network's. norm: of this layer, as typed after `--norm`, in place of
    the network's; "" without the key, which is ours and unknown to darknet.
    """

    kind: ClassVar[str] = "convolutional"

    filters: int = key(1, low=1, high=MAX_CHANNELS)
    size: int = key(1, low=1, high=MAX_WINDOW)
    padding: int = 0
    dilation: int = key(1, low=1, high=MAX_WINDOW)
    groups: int = key(1, low=1, high=MAX_CHANNELS)
    batch_normalize: int = key(0, high=2)
    activation: str = key("logistic", choices=ACTIVATIONS)
    dontload: bool = key(False)
    dontloadscales: bool = key(False)
    learning_rate: float = key(1.0, low=0)
    norm: str = ""

    @classmethod
    def read(cls, section: Section) -> ConvSpec:
        values = read_keys(cls, section)
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
        values["norm"] = section.text("norm")
        if values["norm"] and not values["batch_normalize"]:
            raise section.error("norm= needs batch_normalize=1", "norm")
        section.refuse_unless(share_index="", flipped=0, reverse=0, coordconv=0, binary=0, xnor=0, bin_output=0)
        section.refuse_unless(sway=0, rotate=0, stretch=0, stretch_sway=0)
        section.warn_unless(assisted_excitation=0, dot=0, grad_centr=0)
        section.ignore("angle", "stream", "wait_stream")
        return cls(**values)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        channels = inputs[0].channels
        if channels % self.groups or self.filters % self.groups:
            raise ShapeError(
                f"groups={self.groups} does not divide both {channels} channels and {self.filters} filters"
            )
        window = self.dilation * (self.size - 1) + 1
        return self.window_shape(inputs[0], window, 2 * self.padding)._replace(channels=self.filters)

    def parameter_count(self, inputs: tuple[Shape, ...]) -> int:
        kernel = inputs[0].channels // self.groups * self.size**2
        return self.filters * (kernel + (2 if self.batch_normalize else 1))


SPECS = (ConvSpec,)
