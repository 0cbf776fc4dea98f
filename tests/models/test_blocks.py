"""The blocks networks are spelled with, each against its slow definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models.blocks import ACTIVATIONS, ConvNormAct, DarknetPool, Route, Shortcut, Upsample, make_activation
from models.norms.contract import ConvAware, ConvView
from utils.errors import UserError


def pool_by_hand(x: torch.Tensor, size: int, stride: tuple[int, int], padding: int) -> torch.Tensor:
    """The maximum of the cells of each window that exist; windows start padding // 2 before the picture."""
    images, channels, height, width = x.shape
    rows = (height + padding - size) // stride[0] + 1
    columns = (width + padding - size) // stride[1] + 1
    out = torch.empty(images, channels, rows, columns)
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride[0] - padding // 2, column * stride[1] - padding // 2
            seen = x[:, :, max(top, 0) : top + size, max(left, 0) : left + size]
            out[:, :, row, column] = seen.flatten(2).amax(2)
    return out


@pytest.mark.parametrize("hw", [(7, 8), (6, 6), (5, 9)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_pool_is_darknets(size, stride, hw):
    x = torch.randn(2, 3, *hw) - 5  # below zero, so that padding with zeros would win
    for padding in range(2 * size - 1):
        made = DarknetPool(size, stride, padding)(x)
        assert torch.equal(made, pool_by_hand(x, size, stride, padding)), padding


def test_the_pool_gives_a_finite_gradient():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    DarknetPool(2, (1, 1), 1)(x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.sum() == 16


# --- wiring --------------------------------------------------------------------------------------------------


def test_a_route_of_one_input_passes_it_on():
    x = torch.randn(2, 4, 3, 3)
    assert Route()(x) is x


def test_a_route_concatenates_channels_in_order():
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 6, 3, 3)
    assert torch.equal(Route()(a, b)[:, :4], a) and torch.equal(Route()(a, b)[:, 4:], b)


@pytest.mark.parametrize(("groups", "group_id"), [(2, 0), (2, 1), (3, 2)])
def test_a_grouped_route_takes_its_share_of_each_input(groups, group_id):
    a, b = torch.randn(2, 6, 3, 3), torch.randn(2, 12, 3, 3)
    made = Route(groups, group_id)(a, b)
    channels = [a[:, i] for i in range(6) if i // (6 // groups) == group_id]
    channels += [b[:, i] for i in range(12) if i // (12 // groups) == group_id]
    assert torch.equal(made, torch.stack(channels, dim=1))


def test_a_shortcut_adds_all_inputs_then_activates():
    x, y, z = torch.randn(3, 2, 4, 3, 3).unbind(0)
    torch.testing.assert_close(Shortcut(nn.ReLU())(x, y, z), (x + y + z).clamp(min=0))


@pytest.mark.parametrize(("own", "other"), [(6, 4), (4, 6), (5, 5)])
def test_a_shortcut_of_different_channels_adds_the_common_first_ones(own, other):
    x, y = torch.randn(2, own, 3, 3), torch.randn(2, other, 3, 3)
    made = Shortcut(nn.Identity())(x, y)
    assert made.shape == x.shape
    for channel in range(own):
        expected = x[:, channel] + y[:, channel] if channel < other else x[:, channel]
        assert torch.equal(made[:, channel], expected)


def test_a_shortcut_leaves_its_inputs_alone():
    x, y = torch.randn(1, 6, 2, 2), torch.randn(1, 4, 2, 2)
    before = x.clone()
    Shortcut(nn.Identity())(x, y)
    assert torch.equal(x, before)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_upsampling_repeats_each_cell(stride):
    x = torch.randn(2, 3, 4, 5)
    made = Upsample(stride)(x)
    assert made.shape == (2, 3, 4 * stride, 5 * stride)
    for row in range(4 * stride):
        for column in range(5 * stride):
            assert torch.equal(made[:, :, row, column], x[:, :, row // stride, column // stride])


# --- activations ---------------------------------------------------------------------------------------------

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
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas(name):
    x = torch.linspace(-12, 12, 97, dtype=torch.float64)
    expected = [FORMULAS[name](value) for value in x.tolist()]
    assert make_activation(name)(x).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_an_unknown_activation_names_the_known_ones():
    with pytest.raises(UserError, match="activation 'stair' is not supported: choose one of linear, leaky, mish"):
        make_activation("stair")


# --- ConvNormAct ---------------------------------------------------------------------------------------------


def test_without_a_norm_the_convolution_has_a_bias():
    for factory in (None, lambda conv: None):
        block = ConvNormAct.make(3, 4, 3, padding=1, norm=factory, activation=nn.ReLU())
        assert block.norm is None and block.conv.bias is not None
        assert set(block.state_dict()) == {"conv.weight", "conv.bias"}
        x = torch.randn(2, 3, 5, 5)
        with torch.no_grad():
            block.conv.bias.uniform_()
        expected = nn.functional.conv2d(x, block.conv.weight, block.conv.bias, padding=1).clamp(min=0)
        torch.testing.assert_close(block(x), expected)


def test_with_a_norm_the_convolution_has_none():
    block = ConvNormAct.make(
        4,
        6,
        3,
        stride=(2, 1),
        padding=2,
        dilation=2,
        groups=2,
        norm=lambda conv: nn.GroupNorm(2, 6),
        activation=nn.ReLU(),
    )
    assert block.conv.bias is None
    x = torch.randn(2, 4, 8, 8)
    y = nn.functional.conv2d(x, block.conv.weight, stride=(2, 1), padding=2, dilation=2, groups=2)
    assert block(x).shape == (2, 6, 4, 8)
    torch.testing.assert_close(block(x), nn.functional.group_norm(y, 2).clamp(min=0))


def test_norm_and_bias_exclude_each_other():
    with pytest.raises(AssertionError):
        ConvNormAct(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Identity())
    with pytest.raises(AssertionError):
        ConvNormAct(nn.Conv2d(3, 4, 1, bias=False), None, nn.Identity())


def test_a_norm_is_shown_the_convolution_by_capability():
    class Curious(nn.Module, ConvAware):
        def forward(self, y, view):
            assert isinstance(view, ConvView)
            return y * view.weight.sum()

    block = ConvNormAct.make(3, 4, 1, norm=lambda conv: Curious(), activation=nn.Identity())
    x = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(block(x), block.conv(x) * block.conv.weight.sum())
