"""Activations against their formulas in darknet's activations.h, in plain Python."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from cfg.spec import ACTIVATIONS as NAMES
from models.activations import ACTIVATIONS, make_activation


def hard_mish(x: float) -> float:
    if x > 0:
        return x
    return x * x / 2 + x if x > -2 else 0


FORMULAS = {
    "linear": lambda x: x,
    "leaky": lambda x: x if x > 0 else 0.1 * x,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "logistic": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0),
    "relu6": lambda x: min(max(x, 0), 6),
    "tanh": math.tanh,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "hard_mish": hard_mish,
    "hardtan": lambda x: max(-1, min(1, x)),
}
SMOOTH = torch.tensor([-7.3, -4.6, -2.2, -1.4, -0.3, 0.2, 0.7, 1.3, 2.6, 5.4], dtype=torch.float64)  # no corner there


def test_all_that_a_cfg_may_name_are_there():
    assert set(ACTIVATIONS) == set(NAMES) == set(FORMULAS)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_their_formulas(name):
    x = torch.linspace(-12, 12, 97, dtype=torch.float64)
    expected = [FORMULAS[name](value) for value in x.tolist()]
    assert make_activation(name)(x).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name):
    x = SMOOTH.clone().requires_grad_()
    assert torch.autograd.gradcheck(make_activation(name, in_place=False), (x,))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_overwritten_where_others_read_it(name):
    x = SMOOTH.float()
    made = make_activation(name, in_place=False)(x)
    assert torch.equal(x, SMOOTH.float())
    assert torch.equal(made, make_activation(name)(x.clone()))


@pytest.mark.parametrize("name", NAMES)
def test_they_can_be_copied_and_pickled(name):
    activation = make_activation(name)
    expected = activation(SMOOTH.clone())
    for other in (copy.deepcopy(activation), pickle.loads(pickle.dumps(activation))):
        assert torch.equal(other(SMOOTH.clone()), expected)
