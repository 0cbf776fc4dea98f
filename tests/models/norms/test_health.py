"""What is measured of norms in training: against batch norm by hand, and without a trace in the training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from models.blocks import ConvNormAct
from models.norms.factory import norm_factory
from models.norms.health import NormHealth, summary
from tests.models.norms.kinds import KINDS
from utils.clock import BatchClock


class Network(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Plain(nn.Module):
    """A block of a convolution's output and stock batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_the_mismatch_is_the_root_mean_square_over_channels_and_mini_batches() -> None:
    network = Network(Plain())
    norm = network.layers[0].norm
    norm.momentum = 0.0  # so that running statistics stay
    norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
    parts = torch.randn(3, 2, 3, 5, 5, dtype=torch.float32) * 2 + 1
    health = NormHealth(network)
    with health.watching():
        for part in parts:
            network(part)
    sigma = (norm.running_var + 1e-5).sqrt()
    means, variances = parts.mean((1, 3, 4)), parts.var((1, 3, 4), correction=0)
    (layer,) = health.layers()
    assert layer.mean_mismatch == pytest.approx(((means - norm.running_mean) / sigma).square().mean().sqrt().item())
    ratio = (variances + 1e-5).sqrt() / sigma - 1
    assert layer.sigma_mismatch == pytest.approx(ratio.square().mean().sqrt().item(), rel=1e-5)
    assert layer.pooled_mean_mismatch is layer.pooled_sigma_mismatch is None
    assert set(summary((layer,))) == {"norm/mini_batch_median", "norm/mini_batch_worst"}


def blocks_of(kind: str) -> Network:
    """Two layers of the kind, as the other tests of this folder build them."""
    make = norm_factory(KINDS[kind])
    convs = [nn.Conv2d(channels, 4, 3, padding=1, bias=kind == "none") for channels in (3, 4)]
    return Network(*(ConvNormAct(conv, make(conv), nn.ReLU()) for conv in convs))


def batches() -> Iterator[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        yield [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2)]


def trained(network: Network, *, watched: bool) -> tuple[dict[str, torch.Tensor], NormHealth]:
    clock, health = BatchClock(network), NormHealth(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for batch in batches():
        optimizer.zero_grad()
        for part in clock.minibatches(batch):
            if watched:
                with health.watching():
                    z = network(part)
            else:
                z = network(part)
            z.square().mean().backward()
        optimizer.step()
        clock.stepped()
    return {**network.state_dict(), **dict(network.named_buffers())}, health


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_is_watched_has_the_same_bits(kind: str) -> None:
    torch.manual_seed(0)
    plain, _ = trained(blocks_of(kind), watched=False)
    torch.manual_seed(0)
    network = blocks_of(kind)
    random = torch.get_rng_state()
    watched, health = trained(network, watched=True)
    assert torch.equal(random, torch.get_rng_state())
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert not any(module._forward_hooks for module in network.modules())
    measures = any("running_mean" in name for name in plain)
    assert [layer.layer for layer in health.layers()] == ([0, 1] if measures else [])
    for module in network.modules():
        for used in getattr(module, "used_moments", None) or ():
            assert not used.requires_grad


@pytest.mark.parametrize(
    "kind, pools", [("bn", False), ("bn-pooled", False), ("cmbn-share", True), ("carried", True), ("cbn-std", True)]
)
def test_pooled_statistics_are_told_where_the_norm_pools(kind: str, pools: bool) -> None:
    _, health = trained(blocks_of(kind), watched=True)
    for layer in health.layers():
        assert (layer.pooled_mean_mismatch is not None) == pools
        if pools:
            assert layer.pooled_mean_mismatch != layer.mean_mismatch
            assert layer.pooled_sigma_mismatch != layer.sigma_mismatch
    assert ("norm/pooled_worst" in summary(health.layers())) == pools
