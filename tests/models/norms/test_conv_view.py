"""ConvView against the patches themselves, cut out by unfold."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

from models.norms.contract import ConvView, grid_steps
from models.norms.moments import Moments

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


@pytest.mark.parametrize("groups", [1, 2])
def test_autocast_does_not_round_products_with_the_weight(groups):
    conv, x = case({"kernel_size": 3, "groups": groups}, torch.float32)
    view = ConvView(conv, x)
    patch = view.mean_patch(torch.float32)
    for per_patch in (patch, torch.stack((patch, 2 * patch))):
        expected = view.along_weight(per_patch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = view.along_weight(per_patch)
        assert torch.equal(made, expected) and made.dtype == torch.float32


def test_the_view_is_no_part_of_the_graph_but_its_weight_is():
    conv, x = case({"kernel_size": 3})
    view = ConvView(conv, x.requires_grad_())
    assert view.weight is conv.weight
    assert not view.mean_patch(torch.float64).requires_grad
    assert not view.correlate(torch.randn(3, 8, 5, 7, dtype=torch.float64)).requires_grad


# --- a grid of positions -------------------------------------------------------------------------------------

SHAPES = [(n, 3, h, w) for n in (1, 2, 16) for h, w in ((1, 1), (1, 9), (13, 13), (20, 5), (52, 52))]
WANTED = [1, 2, 7, 64, 256, 1000, 10**6]


def seen_of(shape: tuple[int, ...], steps: tuple[int, int]) -> int:
    return torch.zeros(shape)[:, 0, :: steps[0], :: steps[1]].numel()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positions", WANTED)
def test_a_grid_has_at_least_the_positions_asked_for_of_every_image(shape, positions):
    steps = grid_steps(torch.Size(shape), positions)
    everything, seen = shape[0] * shape[2] * shape[3], seen_of(shape, steps)
    assert min(positions, everything) <= seen <= everything
    assert min(steps) >= 1
    assert seen % shape[0] == 0 and seen >= shape[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positions", WANTED)
def test_no_coarser_grid_would_do(shape, positions):
    """Of those whose steps in rows and columns differ by a factor of two at most."""
    rows, columns = grid_steps(torch.Size(shape), positions)
    seen = seen_of(shape, (rows, columns))
    for other_rows in range(1, shape[2] + 1):
        for other_columns in range(1, min(2 * other_rows, shape[3]) + 1):
            other = seen_of(shape, (other_rows, other_columns))
            assert other < positions or other >= seen


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (0, 3, 5, 4)])
def test_none_asked_for_is_all_of_them(shape):
    assert grid_steps(torch.Size(shape), 0) == (1, 1)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_covariance_over_a_grid_is_that_of_its_positions_scaled_to_the_whole_variance(geometry):
    conv, x = case(geometry)
    y, view = conv(x).detach(), ConvView(conv, x)
    for positions in (0, 3, 10):
        cov, along = view.covariance(y, Moments.of(y), positions=positions)
        rows, columns = grid_steps(y.shape, positions)
        patches = patches_of(conv, x).view(3, conv.groups, -1, *y.shape[2:])[..., ::rows, ::columns]
        for channel in range(8):
            values = y[:, channel, ::rows, ::columns]
            of_group = patches[:, channel * conv.groups // 8].movedim(1, -1)
            expected = ((values - values.mean())[..., None] * of_group).mean((0, 1, 2))
            scale = min(y[:, channel].var(correction=0) / values.var(correction=0), 10)
            torch.testing.assert_close(cov[channel], scale * expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(along[channel], scale * values.var(correction=0))
            torch.testing.assert_close(along[channel], cov[channel] @ conv.weight[channel].flatten())


def test_a_grid_that_sees_no_spread_is_not_blown_up():
    """A channel that fires between the grid's positions only."""
    conv, x = nn.Conv2d(1, 1, 1, bias=False).double(), torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    x[..., 1::2, 1::2] = torch.randn(4, 4, dtype=torch.float64)
    for faint in (0.0, 1e-9):
        x[..., ::2, ::2] = faint * torch.randn(4, 4, dtype=torch.float64)
        y = conv(x).detach()
        assert grid_steps(y.shape, 16) == (2, 2)
        cov, along = ConvView(conv, x).covariance(y, Moments.of(y), positions=16)
        assert torch.isfinite(cov).all() and torch.isfinite(along).all()
        assert cov.abs().max() <= 11 * faint**2 + 1e-30
