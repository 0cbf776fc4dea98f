"""ConvView against the patches themselves, cut out by unfold."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

from models.norms.contract import ConvView

GEOMETRIES = [
    {},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 0, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},  # depthwise
    {"kernel_size": 1, "groups": 2},
    {"kernel_size": (3, 1), "padding": (1, 0), "stride": (2, 1)},
    {"kernel_size": (2, 3), "padding": (1, 2), "stride": (1, 2), "dilation": (2, 1), "groups": 2},
    {"kernel_size": 4, "padding": 1, "stride": 3},  # the last rows of the input are in no patch
]


def case(geometry: dict, dtype=torch.float64) -> tuple[nn.Conv2d, torch.Tensor]:
    conv = nn.Conv2d(4, 8, **{"kernel_size": 1, **geometry}, bias=False).to(dtype)
    return conv, torch.randn(3, 4, 7, 9, dtype=torch.float64).to(dtype)


def patches_of(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """(N, G, K, positions)"""
    cut = unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride, dilation=conv.dilation)
    return cut.view(len(x), conv.groups, -1, cut.shape[-1])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_convolution_is_weights_times_patches(geometry):
    """What the names below mean."""
    conv, x = case(geometry)
    patches = patches_of(conv, x)
    y = conv(x).flatten(2)
    for channel in range(8):
        group = channel * conv.groups // 8
        said = torch.einsum("k,nkp->np", conv.weight[channel].flatten(), patches[:, group])
        torch.testing.assert_close(y[:, channel], said)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_correlate_sums_gradient_times_patch(geometry):
    conv, x = case(geometry)
    grad = torch.randn_like(conv(x))
    made, patches = ConvView(conv, x).correlate(grad), patches_of(conv, x)
    assert made.shape == (8, 4 // conv.groups * conv.weight[0, 0].numel())
    for channel in range(8):
        group = channel * conv.groups // 8
        expected = torch.einsum("np,nkp->k", grad.flatten(2)[:, channel], patches[:, group])
        torch.testing.assert_close(made[channel], expected)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_correlate_is_the_weights_gradient(geometry):
    conv, x = case(geometry)
    y = conv(x)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, conv.weight, grad)
    torch.testing.assert_close(ConvView(conv, x).correlate(grad), expected.flatten(1))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_mean_patch_is_the_mean_of_patches(geometry):
    conv, x = case(geometry)
    made = ConvView(conv, x).mean_patch(torch.float64)
    expected = patches_of(conv, x).mean((0, 3))
    assert made.shape == expected.shape == (conv.groups, conv.weight[0].numel())
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_weights_times_mean_patch_is_the_outputs_mean(geometry):
    conv, x = case(geometry)
    view = ConvView(conv, x)
    said = (view.per_channel(view.mean_patch(torch.float64)) * view.weight.flatten(1)).sum(-1)
    torch.testing.assert_close(said, conv(x).mean((0, 2, 3)))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_per_channel_gives_each_channel_its_groups_row(groups):
    conv = nn.Conv2d(4, 8, 1, groups=groups)
    rows = torch.randn(5, groups, 3)  # as of a ring of 5
    made = ConvView(conv, torch.zeros(1, 4, 1, 1)).per_channel(rows)
    assert made.shape == (5, 8, 3)
    for channel in range(8):
        assert torch.equal(made[:, channel], rows[:, channel * groups // 8])


def test_sums_are_in_the_dtype_asked_for():
    conv, x = case({"kernel_size": 3}, torch.bfloat16)
    view = ConvView(conv, x)
    assert view.mean_patch(torch.float32).dtype == torch.float32
    grad = torch.randn(3, 8, 5, 7)
    assert view.correlate(grad).dtype == torch.float32
    exact = ConvView(conv.double(), x.double())
    torch.testing.assert_close(view.mean_patch(torch.float32).double(), exact.mean_patch(torch.float64))
    torch.testing.assert_close(view.correlate(grad).double(), exact.correlate(grad.double()), rtol=1e-4, atol=1e-4)


def test_the_view_is_no_part_of_the_graph_but_its_weight_is():
    conv, x = case({"kernel_size": 3})
    view = ConvView(conv, x.requires_grad_())
    assert view.weight is conv.weight
    assert not view.mean_patch(torch.float64).requires_grad
    assert not view.correlate(torch.randn(3, 8, 5, 7, dtype=torch.float64)).requires_grad
