"""The blocks networks are spelled with, each against its slow definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from models.blocks import (
    Blur,
    ConvNormAct,
    DarknetPool,
    GlobalAvgPool,
    Product,
    Route,
    Shortcut,
    Softmax,
    SpaceToDepth,
    Upsample,
    WeightedShortcut,
)
from models.norms.contract import ConvAware, ConvView


def pool_by_hand(x: torch.Tensor, size: int, stride: tuple[int, int], padding: int) -> torch.Tensor:
    """The maximum over the cells of each window that exist; windows start padding // 2 before the image."""
    images, channels, height, width = x.shape
    rows = (height + padding - size) // stride[0] + 1
    columns = (width + padding - size) // stride[1] + 1
    out = torch.empty(images, channels, rows, columns)
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride[0] - padding // 2, column * stride[1] - padding // 2
            seen = x[:, :, max(top, 0) : top + size, max(left, 0) : left + size]
            out[:, :, row, column] = seen.flatten(2).amax(-1)
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


def test_a_shortcut_does_not_change_its_inputs():
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


def test_upsampling_scales():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(Upsample(2, scale=0.25)(x), Upsample(2)(x) * 0.25)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_negative_stride_sums_blocks(stride):
    x = torch.randn(2, 3, 6, 12)
    made = Upsample(-stride, scale=0.5)(x)
    assert made.shape == (2, 3, 6 // stride, 12 // stride)
    for row, column in itertools.product(range(6 // stride), range(12 // stride)):
        block = x[:, :, row * stride :, column * stride :][:, :, :stride, :stride]
        torch.testing.assert_close(made[:, :, row, column], 0.5 * block.sum((2, 3)))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_space_to_depth_is_darknets(stride):
    x = torch.randn(2, 5, 6, 12)
    made = SpaceToDepth(stride)(x)
    assert made.shape == (2, 5 * stride**2, 6 // stride, 12 // stride)
    for k, row, column in itertools.product(*map(range, made.shape[1:])):
        dy, dx = divmod(k // 5, stride)
        assert torch.equal(made[:, k, row, column], x[:, k % 5, row * stride + dy, column * stride + dx])


# --- weights, products, means --------------------------------------------------------------------------------


def shortcut_by_hand(weight: torch.Tensor, normalization: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Channel by channel and input by input, as darknet's blas.c does it; inputs may lack channels."""
    out = torch.zeros_like(inputs[0])
    for channel in range(out.shape[1]):
        raw = [w.item() if w.ndim == 0 else w[channel].item() for w in weight]
        used = raw
        if normalization == "relu":
            used = [max(w, 0) / (1e-4 + sum(max(v, 0) for v in raw)) for w in raw]
        elif normalization == "softmax":
            used = [math.exp(w - max(raw)) / (1e-4 + sum(math.exp(v - max(raw)) for v in raw)) for w in raw]
        for each, w in zip(inputs, used, strict=True):
            if channel < each.shape[1]:
                out[:, channel] += w * each[:, channel]
    return out


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("normalization", ["none", "relu", "softmax"])
@pytest.mark.parametrize("others", [(6,), (6, 6, 6), (4, 9)])
def test_a_weighted_shortcut_is_darknets(others, normalization, channels):
    block = WeightedShortcut(1 + len(others), channels, normalization, nn.Identity()).double()
    assert block.weight.shape == ((1 + len(others),) if channels is None else (1 + len(others), 6))
    with torch.no_grad():
        block.weight.uniform_(-1, 2)
    inputs = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in (6, *others)]
    torch.testing.assert_close(block(*inputs), shortcut_by_hand(block.weight.detach(), normalization, inputs))


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("normalization", ["none", "relu", "softmax"])
def test_a_weighted_shortcut_has_the_right_gradient(normalization, channels):
    block = WeightedShortcut(3, channels, normalization, nn.Mish()).double()
    with torch.no_grad():
        block.weight.uniform_(0.5, 2)
    inputs = tuple(torch.randn(2, c, 2, 2, dtype=torch.float64, requires_grad=True) for c in (3, 3, 2))
    weight = block.weight
    assert torch.autograd.gradcheck(
        lambda w, *x: torch.func.functional_call(block, {"weight": w}, x), (weight.detach().requires_grad_(), *inputs)
    )


def test_a_new_weighted_shortcut_is_a_plain_one():
    inputs = torch.randn(3, 2, 4, 3, 3).unbind(0)
    assert torch.equal(WeightedShortcut(3, None, "none", nn.Mish())(*inputs), Shortcut(nn.Mish())(*inputs))
    averaged = WeightedShortcut(3, 4, "softmax", nn.Identity())(*inputs)
    torch.testing.assert_close(averaged, sum(inputs) / 3, rtol=1e-4, atol=1e-4)
    assert list(WeightedShortcut(3, 4, "relu", nn.Identity()).state_dict()) == ["weight"]


def test_a_product_is_of_equal_shapes_or_broadcast():
    y = torch.randn(2, 4, 3, 5)
    for shape in ((2, 4, 3, 5), (2, 4, 1, 1), (2, 1, 3, 5)):
        x = torch.randn(shape)
        made = Product(nn.ReLU())(x, y)
        expected = torch.tensor([max(a * b, 0.0) for a, b in zip(*map(flat, (x.expand_as(y), y)), strict=True)])
        torch.testing.assert_close(made.flatten(), expected)


def flat(x: torch.Tensor) -> list[float]:
    return x.flatten().tolist()


def test_the_global_mean():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(GlobalAvgPool()(x), torch.stack([m.mean() for m in x.flatten(0, 1)]).view(2, 3, 1, 1))


@pytest.mark.parametrize("groups", [1, 3])
def test_a_softmax_is_over_runs_of_values(groups):
    x = torch.randn(2, 6, 2, 1)
    made = Softmax(groups, temperature=0.5)(x)
    assert made.shape == x.shape
    for values, image in zip(made.flatten(1), x.flatten(1), strict=True):
        for got, run in zip(values.chunk(groups), image.chunk(groups), strict=True):
            powers = [math.exp(value / 0.5) for value in run.tolist()]
            assert got.tolist() == pytest.approx([power / sum(powers) for power in powers], rel=1e-5)


# --- antialiasing --------------------------------------------------------------------------------------------

KERNELS = {1: ([[1, 2, 1], [2, 4, 2], [1, 2, 1]], 16, 1), 2: ([[1, 1], [1, 1]], 4, 0)}  # sum, padding


def blur_by_hand(x: torch.Tensor, antialiasing: int, stride: tuple[int, int]) -> torch.Tensor:
    """Each output is the weighted sum of the cells under the kernel; those outside the image are 0."""
    kernel, total, padding = KERNELS[antialiasing]
    size = len(kernel)
    height, width = x.shape[2:]
    rows, columns = (
        (side + 2 * padding - size) // step + 1 for side, step in zip((height, width), stride, strict=True)
    )
    out = torch.zeros(*x.shape[:2], rows, columns)
    for row, column, i, j in itertools.product(range(rows), range(columns), range(size), range(size)):
        r, c = row * stride[0] + i - padding, column * stride[1] + j - padding
        if 0 <= r < height and 0 <= c < width:
            out[:, :, row, column] += kernel[i][j] / total * x[:, :, r, c]
    return out


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2), (3, 2)])
@pytest.mark.parametrize("antialiasing", [1, 2])
def test_the_blur_is_darknets(antialiasing, stride):
    x = torch.randn(2, 3, 7, 8)
    torch.testing.assert_close(Blur(antialiasing, stride)(x), blur_by_hand(x, antialiasing, stride))


def test_the_blur_stores_nothing_and_follows_the_dtype():
    blur = Blur(1, (2, 2))
    assert list(blur.parameters()) == [] and blur.state_dict() == {}
    assert blur.double()(torch.randn(1, 2, 4, 4, dtype=torch.float64)).dtype == torch.float64


def test_the_blur_follows_the_activation():
    block = ConvNormAct.make(
        3, 4, 3, padding=1, norm=nn_batch_norm, activation=nn.LeakyReLU(0.1, inplace=True), blur=Blur(1, (2, 2))
    )
    x = torch.randn(2, 3, 8, 8)
    sharp = nn.functional.leaky_relu(block.norm(block.conv(x)), 0.1)
    torch.testing.assert_close(block(x), blur_by_hand(sharp, 1, (2, 2)))
    assert not any("blur" in name for name in block.state_dict())


def nn_batch_norm(conv: nn.Conv2d) -> nn.Module:
    return nn.BatchNorm2d(conv.out_channels)


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
