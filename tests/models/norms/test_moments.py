"""Moments against numpy in double precision; and pooling, which must not see how the whole was cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.norms.moments import Moments

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def exact(y: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(C,) mean and biased variance in float64."""
    rows = y.detach().double().numpy().transpose(1, 0, 2, 3).reshape(y.shape[1], -1)
    return rows.mean(1), rows.var(1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-12), (torch.bfloat16, 5e-5)]
)
@pytest.mark.parametrize("shape", [(4, 3, 6, 5), (1, 3, 6, 5), (5, 8, 1, 1), (2, 1, 3, 3), (16, 2, 64, 64)])
def test_moments_are_numpys(shape, dtype, tolerance, layout):
    y = (torch.randn(shape) * 2 + 3).to(dtype).to(memory_format=LAYOUTS[layout])
    made = Moments.of(y)
    mean, var = exact(y)
    assert made.count.item() == shape[0] * shape[2] * shape[3]
    assert {made.mean.dtype, made.var.dtype, made.count.dtype} == {torch.promote_types(dtype, torch.float32)}
    np.testing.assert_allclose(made.mean.double(), mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(made.var.double(), var, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("view", ["sliced", "transposed"])
def test_strided_views_are_read_right(view):
    y = torch.randn(3, 4, 6, 8)
    y = y[:, ::2, 1:, ::3] if view == "sliced" else y.transpose(2, 3)
    mean, var = exact(y)
    np.testing.assert_allclose(Moments.of(y).mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Moments.of(y).var, var, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hw", [(16, 16), (1, 8), (63, 65)])
def test_a_mean_far_above_the_deviation_does_not_cancel(hw, layout):
    """1e4 and 1: E[y^2] - E[y]^2 in single precision would be off by more than the variance (1e8 * 6e-8)."""
    y = (torch.randn(8, 3, *hw) + 1e4).to(memory_format=LAYOUTS[layout])
    made, (mean, var) = Moments.of(y), exact(y)
    np.testing.assert_allclose(made.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(made.var, var, rtol=1e-3)


def test_images_of_different_means_count_their_spread():
    y = torch.cat([torch.randn(1, 2, 8, 8) + 100 * image for image in range(4)])
    np.testing.assert_allclose(Moments.of(y).var, exact(y)[1], rtol=1e-5)
    assert (Moments.of(y).var > 1e4).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_position_has_no_variance(layout):
    y = (torch.randn(1, 3, 1, 1) * 100).to(memory_format=LAYOUTS[layout])
    made = Moments.of(y)
    assert made.count.item() == 1
    assert torch.equal(made.mean, y.flatten())
    assert made.var.tolist() == [0, 0, 0]


def test_a_constant_channel_has_no_variance():
    y = torch.randn(2, 2, 4, 4)
    y[:, 1] = 0.1
    var = Moments.of(y).var
    assert var[0] > 0.1 and 0 <= var[1] < 1e-12


def test_moments_are_no_part_of_the_graph():
    made = Moments.of(torch.randn(2, 3, 4, 4, requires_grad=True))
    assert not made.mean.requires_grad and not made.var.requires_grad


# --- pooling -------------------------------------------------------------------------------------------------


def pooled(parts: list[torch.Tensor]) -> Moments:
    whole = Moments.of(parts[0])
    for part in parts[1:]:
        whole = whole.merged_with(Moments.of(part))
    return whole


def assert_equal(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    for x, y in ((a.count, b.count), (a.mean, b.mean), (a.var, b.var)):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (1, 11), (3, 4, 5), (1,) * 12])
def test_pooling_does_not_see_the_cut(sizes):
    y = torch.randn(12, 3, 5, 4, dtype=torch.float64) * torch.arange(1, 13).view(-1, 1, 1, 1) + 7
    assert_equal(pooled(list(y.split(sizes))), Moments.of(y))


def test_pooling_is_associative_and_commutative():
    a, b, c = (Moments.of(torch.randn(n, 3, 5, 4, dtype=torch.float64) * n + n) for n in (1, 2, 5))
    assert_equal(a.merged_with(b).merged_with(c), a.merged_with(b.merged_with(c)))
    assert_equal(a.merged_with(b), b.merged_with(a))


def test_pooling_does_not_cancel_in_single_precision():
    y = torch.randn(16, 3, 8, 8) + 1e4
    np.testing.assert_allclose(pooled(list(y.split(1))).var, exact(y)[1], rtol=2e-3)


def empty(channels: int = 3) -> Moments:
    zeros = torch.zeros(channels, dtype=torch.float64)
    return Moments(count=zeros.new_zeros(()), mean=zeros, var=zeros)


def test_the_empty_population_is_neutral():
    some = Moments.of(torch.randn(2, 3, 5, 4, dtype=torch.float64) + 3)
    assert_equal(empty().merged_with(some), some)
    assert_equal(some.merged_with(empty()), some)


def test_two_empty_populations_are_empty():
    assert_equal(empty().merged_with(empty()), empty())
