"""The optimizer that the conclusions of the benchmark rest on: Adam whose scale is shared by many weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks.why_sgd import AVERAGED, SharedScaleAdam


def trained(shared: str, factors: Sequence[Sequence[float]]) -> Tensor:
    """Train a (2, 2) tensor on a quadratic whose gradient has these factors."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = SharedScaleAdam([{"params": [weight], "shared": shared, "lr": 0.01, **AVERAGED}])
    for _ in range(20):
        weight.grad = torch.tensor(factors) * weight.detach()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    ("factors", "independent"),
    [
        ([[9, 9], [9, 9]], {"tensor", "filter", "channel", "weight"}),
        ([[1, 1], [9, 9]], {"filter", "weight"}),
        ([[1, 9], [1, 9]], {"channel", "weight"}),
        ([[1, 9], [9, 9]], {"weight"}),
    ],
)
@pytest.mark.parametrize("shared", ["tensor", "filter", "channel", "weight"])
def test_only_a_factor_inside_a_set_changes_the_training(
    shared: str, factors: list[list[float]], independent: set[str]
) -> None:
    change = (trained(shared, factors) - trained(shared, [[1, 1], [1, 1]])).abs().max()
    assert (change < 1e-5) == (shared in independent)


def test_without_a_scale_it_is_sgd() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.01, **AVERAGED)
    for _ in range(20):
        weight.grad = 3 * weight.detach()
        optimizer.step()
    torch.testing.assert_close(trained("", [[3, 3], [3, 3]]), weight.detach())


def test_a_constant_gradient_moves_weights_by_the_rate_as_with_adam() -> None:
    weights = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    ours = SharedScaleAdam([{"params": weights[:1], "shared": "weight", "lr": 0.01, **AVERAGED}])
    for optimizer, weight in zip((ours, torch.optim.Adam(weights[1:], lr=0.01)), weights, strict=True):
        for _ in range(10):
            weight.grad = torch.tensor([[1.0, -2.0], [30.0, -0.04]])
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])
