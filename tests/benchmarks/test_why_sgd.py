"""The optimizer that the conclusions of the benchmark rest on: Adam whose scale is shared by many weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks.why_sgd import SharedScaleAdam


def trained(shared: str, factors: Sequence[Sequence[float]]) -> Tensor:
    """Train a (2, 2) tensor on a quadratic whose gradient has these factors."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = SharedScaleAdam([{"params": [weight], "shared": shared, "momentum": 0.9, "dampening": 0.1, "lr": 0.01}])
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
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9, dampening=0.1)
    for _ in range(20):
        weight.grad = 3 * weight.detach()
        optimizer.step()
    torch.testing.assert_close(trained("", [[3, 3], [3, 3]]), weight.detach())
