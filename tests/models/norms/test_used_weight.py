"""Weight centralization: what is convolved has mean zero, what is stored and differentiated is the parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.norms.contract import ConvView
from models.norms.used_weight import CentralizedConv2d, used_weight
from tests.models.norms.kinds import CONV_SHAPES, KINDS, block, noise_like, parts

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


def test_a_bias_is_added_after_it():
    conv = CentralizedConv2d(4, 8, 3)
    x = parts(dtype=torch.float32)[0]
    torch.testing.assert_close(conv(x), F.conv2d(x, used_weight(conv)) + conv.bias.view(-1, 1, 1))


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind != "none"])  # which refuses to be centred
def test_the_state_dict_is_that_of_the_plain_convolution(kind):
    """So that weights and converters work; and the stored parameter is not touched by training forwards."""
    plain, centred = block(kind), block(replace(KINDS[kind], weight_centralization=True))
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


def test_the_view_shows_the_filters_used():
    conv = CentralizedConv2d(4, 8, 3, bias=False).double()
    x = parts()[0]
    view = ConvView(conv, x)
    assert torch.equal(view.weight, used_weight(conv)) and view.weight.requires_grad
    said = view.along_weight(view.mean_patch(torch.float64))
    torch.testing.assert_close(said, conv(x).mean((0, 2, 3)), rtol=1e-12, atol=1e-13)


def test_gradcheck():
    conv = CentralizedConv2d(2, 3, 2, bias=False).double()
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
