"""EvoNorm-S0 and FRN: norms of single images that take the place of the activation as well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.activations import ACTIVATIONS
from tests.models.norms.kinds import KINDS, OWN_ACTIVATION, arrays, assert_agree, block, conv_then_norm, parts
from tests.reference import norms as oracle

STAY = {"linear", "logistic", "tanh", "hardtan"}  # no activation, gates and bounded outputs
DEGENERATE = {"no image": (0, (5, 4)), "one image": (1, (5, 4)), "one position": (2, (1, 1))}


def made(kind: str, activation: str) -> nn.Module:
    module = block(kind, activation=ACTIVATIONS[activation]())
    for parameter in (getattr(module.norm, "v", None), getattr(module.norm, "tau", None)):
        if parameter is not None:
            nn.init.uniform_(parameter, -0.5, 1.5)
    return module


@pytest.mark.parametrize("activation", ["mish", "linear"])
@pytest.mark.parametrize("kind", OWN_ACTIVATION)
def test_the_forward_is_its_formula(kind, activation):
    module = made(kind, activation)
    norm = module.norm
    for x in parts():
        y, out = conv_then_norm(module, x)
        values, gamma, beta = arrays(y, norm.weight, norm.bias)
        own = norm.v if kind == "evonorm-s0" else norm.tau
        (own,) = (None,) if own is None else arrays(own)
        assert (own is None) == (activation == "linear")
        if kind == "evonorm-s0":
            assert_agree(out, oracle.evonorm_s0(values, gamma, beta, own, 2, norm.eps))
        else:
            assert_agree(out, oracle.frn(values, gamma, beta, own, norm.eps))


@pytest.mark.parametrize("activation", ["mish", "linear"])
@pytest.mark.parametrize("kind", OWN_ACTIVATION)
def test_the_gradient_to_the_input_and_all_parameters_is_true(kind, activation):
    module = made(kind, activation)
    names, values = zip(*((name, p.detach().requires_grad_()) for name, p in module.named_parameters()), strict=True)
    assert len(names) == (3 if activation == "linear" else 4)
    (x,) = parts((2,), hw=(3, 2))
    assert torch.autograd.gradcheck(
        lambda t, *given: torch.func.functional_call(module, dict(zip(names, given, strict=True)), t),
        (x.requires_grad_(), *values),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", OWN_ACTIVATION)
def test_it_replaces_activations_but_leaves_linear_layers_linear_and_gates_closed(kind, activation):
    module = made(kind, activation)
    assert module.norm_activates == (activation not in STAY)
    (x,) = parts((2,))
    normalized = module.norm(module.conv(x))
    expected = normalized if module.norm_activates else module.act(normalized)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in [*OWN_ACTIVATION, "none"]])
def test_no_other_norm_replaces_an_activation(kind):
    """It may apply the block's own."""
    activation = nn.LeakyReLU(0.1)
    module = block(kind, activation=activation)
    assert not module.norm_activates and module.act is activation


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("activation", ["mish", "linear"])
@pytest.mark.parametrize("kind", OWN_ACTIVATION)
def test_small_inputs_have_finite_outputs_and_gradients(kind, activation, case):
    """Those of one value per statistic, too, which a training refuses; and images of zeros."""
    images, hw = DEGENERATE[case]
    module = made(kind, activation)
    for factor in (1, 0):
        (x,) = parts((images,), hw=hw)
        x = (factor * x).requires_grad_()
        out = module(x)
        out.sum().backward()
        assert out.shape[0] == images and out.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", OWN_ACTIVATION)
def test_an_image_does_not_depend_on_its_batch_mates(kind):
    module = made(kind, "mish")
    (x,) = parts((3,))
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]), rtol=1e-12, atol=1e-12)
