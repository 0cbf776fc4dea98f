"""The parts that the conclusions of the benchmark rest on: the eigenvalue, and what a shared scale does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks.why_sgd import SharedScaleAdam, largest_eigenvalue, regrouped


@pytest.mark.parametrize("low", [-1.0, -200.0, 50.0])
def test_the_largest_eigenvalue_is_that_of_linalg(low: float) -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    matrix = basis @ torch.diag(torch.tensor([low, *range(1, 11), 100.0])) @ basis.T

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        image = matrix @ torch.cat([v.flatten() for v in vector])
        return [image[:8].view(2, 4), image[8:]]

    found = largest_eigenvalue(product, [torch.Size((2, 4)), torch.Size((4,))], rounds=60)
    assert found == pytest.approx(100, rel=1e-3)


def trained(*, factors: Sequence[float], scale: str) -> list[Tensor]:
    """Train two tensors on a quadratic whose gradients have these factors."""
    weights = [nn.Parameter(torch.full((3,), 1.0)), nn.Parameter(torch.full((2, 2), -2.0))]
    optimizer = SharedScaleAdam(regrouped({"heads": weights[:1], "rest": weights[1:]}, scale))
    for _ in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        for weight, factor in zip(weights, factors, strict=True):
            weight.grad = factor * weight.detach()
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("scale", ["all", "part", "tensor"])
def test_a_common_factor_of_the_gradient_does_not_matter(scale: str) -> None:
    for now, before in zip(trained(factors=(1e3, 2e3), scale=scale), trained(factors=(1, 2), scale=scale), strict=True):
        torch.testing.assert_close(now, before)


def test_a_factor_between_tensors_matters_only_if_they_share_a_scale() -> None:
    even, uneven = (trained(factors=(1, factor), scale="tensor")[1] for factor in (1, 100))
    torch.testing.assert_close(uneven, even)
    even, uneven = (trained(factors=(1, factor), scale="all")[0] for factor in (1, 100))
    assert (uneven - even).abs().min() > 0.05
