"""Centralized and standardized weights: what is convolved is a function of what is stored and differentiated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.norms.contract import ConvView
from models.norms.used_weight import CentralizedConv2d, StandardizedConv2d, filters_of, used_weight
from tests.models.norms.kinds import CONV_SHAPES, KINDS, assert_agree, block, noise_like, parts, tuned
from tests.reference import norms as oracle

PLAIN = [
    kind
    for kind, options in KINDS.items()
    if not (options.weight_centralization or options.spec.centralizes_weights or options.spec.ws)
]


@pytest.mark.parametrize(("groups", "stride", "size"), CONV_SHAPES)
def test_the_filters_used_have_mean_zero(groups, stride, size):
    conv = CentralizedConv2d(4, 8, size, stride=stride, groups=groups, bias=False).double()
    torch.nn.init.uniform_(conv.weight, 1, 2)
    used = used_weight(conv)
    assert used.mean((1, 2, 3)).abs().max() < 1e-15
    if conv.weight[0].numel() > 1:
        x = parts()[0]
        expected = F.conv2d(x, conv.weight - conv.weight.mean((1, 2, 3), keepdim=True), stride=stride, groups=groups)
        torch.testing.assert_close(conv(x), expected, rtol=1e-13, atol=1e-13)
    # An image brighter by a constant looks the same, where no padding is seen.
    x = parts(hw=(7, 7))[0]
    torch.testing.assert_close(conv(x + 3), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("groups", "stride", "size"), CONV_SHAPES)
def test_standardized_filters_are_their_formula(groups, stride, size):
    conv = StandardizedConv2d(4, 8, size, stride=stride, padding=1, groups=groups, bias=False).double()
    with torch.no_grad():
        conv.weight.mul_(torch.logspace(-4, 2, 8).view(-1, 1, 1, 1)).add_(0.1)
    used = used_weight(conv)
    assert_agree(used, oracle.standardized(conv.weight.detach().numpy(), 1e-6), relative=1e-9)  # the oracle cancels
    assert used.mean((1, 2, 3)).abs().max() < 1e-12
    assert (used[-1].var(correction=0) - 1).abs() < 1e-6 or conv.weight[0].numel() == 1
    x = parts()[0]
    expected = F.conv2d(x, used, stride=stride, padding=1, groups=groups)
    torch.testing.assert_close(conv(x), expected, rtol=1e-13, atol=1e-13)


def test_a_filter_of_one_number_becomes_zero_and_one_without_variance_too():
    conv = StandardizedConv2d(4, 4, 1, groups=4, bias=False)
    assert torch.equal(used_weight(conv), torch.zeros(4, 1, 1, 1))
    flat = StandardizedConv2d(4, 4, 3, bias=False)
    torch.nn.init.constant_(flat.weight, 7)
    flat(parts(dtype=torch.float32)[0]).sum().backward()
    assert torch.equal(used_weight(flat), torch.zeros_like(flat.weight)) and flat.weight.grad.isfinite().all()


def test_a_network_says_what_its_filters_are():
    assert [filters_of(block(kind)) for kind in ("bn", "bn-centred", "bn-ws")] == ["", "centralized", "standardized"]


@pytest.mark.parametrize("kind", [CentralizedConv2d, StandardizedConv2d])
def test_a_bias_is_added_after_it(kind):
    conv = kind(4, 8, 3)
    x = parts(dtype=torch.float32)[0]
    torch.testing.assert_close(conv(x), F.conv2d(x, used_weight(conv)) + conv.bias.view(-1, 1, 1))


@pytest.mark.parametrize(
    "how", [lambda kind: {"weight_centralization": True}, lambda kind: {"norm": tuned(KINDS[kind], ws=True).norm}]
)
@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind != "none"])  # which refuses both
def test_the_state_dict_is_that_of_the_plain_convolution(kind, how):
    """So that weights and converters work; and the stored parameter is not touched by training forwards."""
    plain, centred = block(kind), block(replace(KINDS[kind], **how(kind)))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in centred.state_dict().items()}
    centred.load_state_dict(plain.state_dict())
    centred(parts()[0])
    assert torch.equal(centred.conv.weight, plain.conv.weight)


def test_a_layer_whose_filters_are_centred_already_is_the_plain_one():
    for kind in ("bn", "cmbn-weights", "cbn-std-weights"):
        plain, centred = block(kind), block(replace(KINDS[kind], weight_centralization=True))
        with torch.no_grad():
            plain.conv.weight.copy_(used_weight(centred.conv))
        for x in parts():
            torch.testing.assert_close(centred(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [CentralizedConv2d, StandardizedConv2d])
def test_the_view_shows_the_filters_used(kind):
    conv = kind(4, 8, 3, bias=False).double()
    x = parts()[0]
    view = ConvView(conv, x)
    assert torch.equal(view.weight, used_weight(conv)) and view.weight.requires_grad
    said = view.along_weight(view.mean_patch(torch.float64))
    torch.testing.assert_close(said, conv(x).mean((0, 2, 3)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [CentralizedConv2d, StandardizedConv2d])
def test_gradcheck(kind):
    conv = kind(2, 3, 2, bias=False).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, w: torch.func.functional_call(conv, {"weight": w}, t), (x, conv.weight.detach().requires_grad_())
    )


def test_the_gradient_is_that_of_the_filters_used_without_its_mean():
    conv = CentralizedConv2d(4, 8, 3, bias=False).double()
    x = parts()[0]
    out = conv(x)
    g = noise_like(out, 3)
    (stored,) = torch.autograd.grad(out, conv.weight, g)
    used = used_weight(conv).detach().requires_grad_()
    (plain,) = torch.autograd.grad(F.conv2d(x, used), used, g)
    torch.testing.assert_close(stored, plain - plain.mean((1, 2, 3), keepdim=True), rtol=1e-12, atol=1e-12)
