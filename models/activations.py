"""Activations by the names that cfgs use.

Source: darknet `activations.h`. Where torch has the function it is torch's; selu's two constants have more digits
there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Elementwise(nn.Module):
    """A function of each value, for which torch has no module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.function.__name__


def loggy(x: Tensor) -> Tensor:
    """2 * logistic(x) - 1, without its cancellation near 0."""
    return torch.tanh(x / 2)


def ramp(x: Tensor) -> Tensor:
    return F.relu(x) + 0.1 * x


def plse(x: Tensor) -> Tensor:
    """A logistic of three straight pieces: the outer ones are nearly flat."""
    return torch.where(x < -4, 0.01 * (x + 4), torch.where(x > 4, 0.01 * (x - 4) + 1, 0.125 * x + 0.5))


def stair(x: Tensor) -> Tensor:
    """Flat over [0, 1), rising by one over [1, 2), and so on in both directions."""
    step = torch.floor(x)
    return torch.floor(x / 2) + torch.where(step.remainder(2) == 0, 0, x - step)


def lhtan(x: Tensor) -> Tensor:
    """The identity between 0 and 1, nearly flat outside."""
    return torch.where(x < 0, 0.001 * x, torch.where(x > 1, 0.001 * (x - 1) + 1, x))


def hard_mish(x: Tensor) -> Tensor:
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
    "hard_mish": partial(Elementwise, hard_mish),
    "loggy": partial(Elementwise, loggy),
    "relie": partial(nn.LeakyReLU, 0.01),
    "ramp": partial(Elementwise, ramp),
    "plse": partial(Elementwise, plse),
    "stair": partial(Elementwise, stair),
    "hardtan": nn.Hardtanh,
    "lhtan": partial(Elementwise, lhtan),
}


def make_activation(name: str, *, in_place: bool = True) -> nn.Module:
    """in_place: whether it may overwrite its input, where that saves memory."""
    activation = ACTIVATIONS[name]()
    if not in_place and hasattr(activation, "inplace"):
        activation.inplace = False
    return activation
