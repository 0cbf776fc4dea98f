"""Activations by their names in cfgs.

Source: darknet `activations.h`. torch's own where it has the function; its selu has more digits in the two constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


class HardMish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, torch.where(x > -2, x * x / 2 + x, 0))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    # In place: the gradient needs the sign only, and neither a convolution nor a norm keeps its output.
    "leaky": partial(nn.LeakyReLU, 0.1, inplace=True),
    "mish": nn.Mish,
    "swish": nn.SiLU,
    "logistic": nn.Sigmoid,
    "relu": partial(nn.ReLU, inplace=True),
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": partial(nn.GELU, approximate="tanh"),
    "tanh": nn.Tanh,
    "hard_mish": HardMish,
    "hardtan": nn.Hardtanh,
}


def make_activation(name: str, *, in_place: bool = True) -> nn.Module:
    """in_place: whether it may overwrite its input, where that saves memory."""
    activation = ACTIVATIONS[name]()
    if not in_place and isinstance(activation, nn.LeakyReLU | nn.ReLU):
        activation.inplace = False
    return activation
