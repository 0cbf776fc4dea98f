"""What timm has as well computes the same there, in the forward and in the backward."""

from __future__ import annotations

import pytest
import torch
from timm.layers import EvoNorm2dS0, EvoNorm2dS0a, FilterResponseNormTlu2d, StdConv2d
from torch import nn

from models.norms.evonorm import EvoNormS0
from models.norms.frn import FilterResponseNorm
from models.norms.used_weight import StandardizedConv2d
from tests.models.norms.kinds import CONV_SHAPES, noise_like, parts

PAIRS = {
    "evonorm-s0": lambda: (EvoNormS0(8, groups=4, eps=1e-5), EvoNorm2dS0(8, groups=4)),
    "evonorm-s0, linear": lambda: (
        EvoNormS0(8, groups=4, eps=1e-3),
        EvoNorm2dS0a(8, groups=4, apply_act=False),
    ),
    "frn": lambda: (FilterResponseNorm(8, eps=1e-5), FilterResponseNormTlu2d(8)),
    "frn, linear": lambda: (FilterResponseNorm(8, eps=1e-5), FilterResponseNormTlu2d(8, apply_act=False)),
}


@pytest.fixture(autouse=True)
def float64_stays_float64(monkeypatch):
    """timm computes its statistics in `.float()`."""
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t)


def assert_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    ours.load_state_dict(theirs.state_dict())  # the same names
    found = []
    for module in (ours, theirs):
        t = x.clone().requires_grad_()
        out = module(t)
        found.append([out, *torch.autograd.grad(out, [t, *module.parameters()], noise_like(out, 3))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_norms_with_an_activation_of_their_own(pair):
    ours, theirs = (module.double() for module in PAIRS[pair]())
    if "linear" not in pair:
        assert ours.take_over(nn.Mish())
        ours.double()
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, -0.5, 1.5)
    for x in parts():
        assert_same(ours, theirs, x.repeat(1, 2, 1, 1))


@pytest.mark.parametrize(("groups", "stride", "size"), CONV_SHAPES)
def test_standardized_convolutions(groups, stride, size):
    settings = {"stride": stride, "padding": size // 2, "groups": groups, "bias": False}
    ours, theirs = (kind(4, 8, size, **settings).double() for kind in (StandardizedConv2d, StdConv2d))
    for x in parts():
        assert_same(ours, theirs, x)
