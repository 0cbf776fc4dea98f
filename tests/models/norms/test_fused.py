"""A norm that applies the activation itself keeps less, and gives the numbers of the two in a row."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.activations import make_activation
from models.norms.mabn import MovingAverageNorm
from tests.models.norms.kinds import (
    BATCH_STATISTICS,
    CORE,
    DTYPES,
    LAYOUTS,
    OWN_ACTIVATION,
    assert_same_bits,
    block,
    norm_class,
    state_of,
    steps,
)

FOLLOWED = [kind for kind in CORE if kind not in OWN_ACTIVATION]
FUSED = [kind for kind in BATCH_STATISTICS if kind in CORE and not issubclass(norm_class(kind), MovingAverageNorm)]


def apart(kind: str, activation: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The activation as a layer after a block that has none."""
    return nn.Sequential(block(kind, dtype=dtype), copy.deepcopy(activation))


@pytest.mark.parametrize(
    ("activation", "dtype", "layout"),
    [
        (nn.Mish(), "float64", "NCHW"),
        (nn.SiLU(), "float64", "NCHW"),
        (nn.Mish(), "float32", "channels_last"),
        (nn.SiLU(), "bf16 autocast", "NCHW"),
    ],
    ids=lambda value: getattr(value, "_get_name", lambda: value)(),
)
@pytest.mark.parametrize("kind", FUSED)
def test_fused_is_one_after_the_other(kind, activation, dtype, layout):
    fused = block(kind, activation=activation, dtype=DTYPES[dtype])
    assert fused.norm_activates
    rows = apart(kind, activation, DTYPES[dtype])
    for net in (fused, rows):
        net.to(memory_format=LAYOUTS[layout])
    tolerance = {"float64": 1e-12, "float32": 1e-5, "bf16 autocast": 3e-2}[dtype]
    settings = {"dtype": dtype, "layout": layout, "count": 2}
    for ours, theirs in zip(steps(fused, **settings), steps(rows, **settings), strict=True):
        for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                assert (a - b).abs().max() <= tolerance * b.abs().max()
        if dtype == "bf16 autocast":  # where a rounded gradient moves the weights of the next step elsewhere
            rows[0].load_state_dict(fused.state_dict())


@pytest.mark.parametrize("activation", ["leaky", "relu"])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_an_activation_in_place_spoils_nothing_that_the_backward_needs(kind, activation):
    """Those that the blocks are made with: a norm must not keep its output."""
    in_place = make_activation(activation)
    assert in_place.inplace
    inside, outside = block(kind, activation=in_place), apart(kind, make_activation(activation), torch.float64)
    outside[1].inplace = False
    for ours, theirs in zip(steps(inside), steps(outside), strict=True):
        for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("activation", [nn.Mish(), nn.SiLU()], ids=["mish", "silu"])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_evaluation_activates_once(kind, activation):
    inside, outside = block(kind, activation=activation), apart(kind, activation, torch.float64)
    for net in (inside, outside):
        for _ in steps(net, count=1):
            pass
    outside[0].load_state_dict(inside.state_dict())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(inside.eval()(x), outside.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", FUSED)
def test_fused_keeps_one_tensor_of_the_outputs_size_less(kind):
    kept = []
    for net in (block(kind, activation=nn.Mish()), apart(kind, nn.Mish(), torch.float64)):
        storages = {}

        def pack(t: torch.Tensor, storages: dict = storages) -> torch.Tensor:
            if t.numel() == 2 * 8 * 20:
                storages[t.untyped_storage().data_ptr()] = t
            return t

        x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = net(x)
        assert out.shape == (2, 8, 5, 4)
        kept.append(len(storages))
    assert kept == [1, 2]


def test_a_copy_fuses_too():
    module = block("cbn-std", activation=nn.Mish())
    twin = copy.deepcopy(module)
    for ours, theirs in zip(steps(twin), steps(module), strict=True):
        assert torch.equal(ours[0], theirs[0])
    assert_same_bits(state_of(twin), state_of(module))
