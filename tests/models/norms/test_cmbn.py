"""CmBN: pooled moments of a batch's mini-batches, and its four gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.blocks import ConvNormAct
from models.norms.cmbn import DarknetCrossMiniBatchNorm
from tests.models.norms.kinds import (
    CONV_SHAPES,
    KINDS,
    arrays,
    assert_agree,
    assert_is_graph_of,
    block,
    conv_then_norm,
    cosine_to_filters,
    noise_like,
    normalized_by,
    parts,
    run_batch,
    stock_block,
    tuned,
)
from tests.reference import norms as oracle
from utils.clock import BatchClock

POOLED = [kind for kind in KINDS if kind.startswith("cmbn") and kind != "cmbn-darknet"]


@pytest.mark.parametrize("kind", POOLED)
def test_the_forward_pools_mini_batches_of_unequal_size(kind):
    module = block(kind)
    batch = parts()
    outputs = run_batch(module, BatchClock(module), batch)
    ys = [module.conv(x).detach().numpy() for x in batch]
    gamma, beta = arrays(module.norm.weight, module.norm.bias)
    for out, y, (mean, var, _) in zip(outputs, ys, oracle.cmbn_moments(ys), strict=True):
        assert_agree(out, oracle.normalized(y, mean, var, gamma, beta, module.norm.eps))


@pytest.mark.parametrize("kind", POOLED)
def test_every_batch_begins_anew(kind):
    module, fresh = block(kind), block(kind)
    run_batch(module, BatchClock(module), parts(seed=5))
    for ours, theirs in zip(
        run_batch(module, BatchClock(module), parts()), run_batch(fresh, BatchClock(fresh), parts()), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", POOLED)
def test_the_last_mini_batch_sees_the_whole_batch(kind):
    """As if it had been normalized together with the others: the end of the pool is batch norm."""
    module, stock = block(kind), stock_block(kind)
    batch = parts()
    together = stock(torch.cat(batch)).split([len(x) for x in batch])
    torch.testing.assert_close(run_batch(module, BatchClock(module), batch)[-1], together[-1], rtol=1e-11, atol=1e-11)


# --- the gradient to what is normalized ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", POOLED)
def test_the_backward_is_its_formula(kind):
    """Of `weights` to the input and the affine part, where it is that of `share`."""
    module = block(kind)
    batch, renormed = parts(), kind == "cmbn-renorm"
    moments = oracle.cmbn_moments([module.conv(x).detach().numpy() for x in batch])
    for x, (mean, var, count) in zip(BatchClock(module).minibatches(batch), moments, strict=True):
        module.zero_grad()
        y, out = conv_then_norm(module, x)
        g = noise_like(out, 4)
        out.backward(g)
        values, gradient, gamma = arrays(y, g, module.norm.weight)
        if renormed:
            expected = oracle.renorm_backward(values, gradient, gamma, mean, var, module.norm.eps)
        else:
            expected = oracle.share_backward(values, gradient, gamma, mean, var, count, module.norm.eps)
        for ours, theirs in zip((y.grad, module.norm.weight.grad, module.norm.bias.grad), expected, strict=True):
            assert_agree(ours, theirs)


# --- the gradient `weights` ----------------------------------------------------------------------------------


def by_autograd(module: ConvNormAct, batch: list[Tensor], t: int) -> Tensor:
    """Output of mini-batch t with every earlier one in the graph through the conv's weights, but not its input."""
    ys = [module.conv(x if i == t else x.detach()) for i, x in enumerate(batch[: t + 1])]
    rows = torch.cat([y.transpose(0, 1).flatten(1) for y in ys], dim=1)
    mean, var = rows.mean(1), rows.var(1, correction=0)
    return normalized_by(module.norm, ys[-1], mean, var)


@pytest.mark.parametrize("kind", ["cmbn-weights", "cmbn-weights-centred"])
@pytest.mark.parametrize(("groups", "stride", "size"), CONV_SHAPES)
def test_the_gradient_to_the_weights_is_that_of_a_graph_that_keeps_all_mini_batches(kind, groups, stride, size):
    module = block(kind, groups=groups, stride=stride, size=size)
    batch = parts()
    assert_is_graph_of(module, batch, lambda t: by_autograd(module, batch, t))


@pytest.mark.parametrize("positions", [0, 6, 20])
@pytest.mark.parametrize("kind", ["cmbn-weights", "cmbn-weights-centred"])
def test_the_gradient_to_the_weights_is_orthogonal_to_each_filter(kind, positions):
    """As batch norm's: the output does not change with a filter's length. From a grid of positions too."""
    module = block(tuned(KINDS[kind], positions=positions))
    module.norm.eps = 0.0
    exact = block(kind)
    exact.norm.eps = 0.0
    differs = False
    for t, x in enumerate(BatchClock(torch.nn.ModuleList([module, exact])).minibatches(parts(hw=(7, 6)))):
        gradients = []
        for net in (module, exact):
            net.zero_grad()
            out = net(x)
            out.backward(noise_like(out, t))
            gradients.append(net.conv.weight.grad.flatten(1))
        assert cosine_to_filters(module).abs().max() < 1e-12
        differs |= not torch.allclose(*gradients)
    assert differs == (positions > 0)  # else the grid was not one


@pytest.mark.parametrize("kind", ["cmbn-weights", "cmbn-share", "cmbn-renorm"])
def test_a_gradient_is_what_its_name_says(kind):
    """Of the three only `weights` is orthogonal to the filters after the first mini-batch."""
    module = block(kind)
    module.norm.eps = 0.0
    for t, x in enumerate(BatchClock(module).minibatches(parts())):
        module.zero_grad()
        out = module(x)
        out.backward(noise_like(out, t))
        assert (cosine_to_filters(module).abs().max() < 1e-10) == (t == 0 or kind != "cmbn-share")


@pytest.mark.parametrize("kind", ["cmbn-weights", "carried"])
def test_in_burn_in_it_is_batch_norm_of_each_mini_batch(kind):
    module, stock = block(tuned(KINDS[kind], burn_in_steps=2)), block("bn")
    clock = BatchClock(module)
    for step in range(4):
        batch = parts(seed=step)
        ours, theirs = run_batch(module, clock, batch), [stock(x) for x in batch]
        same = [torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(ours, theirs, strict=True)]
        assert all(same) if step < 2 else not any(same[1:])
        clock.stepped()


# --- the gradient `darknet` ----------------------------------------------------------------------------------


def darknets_numbers(golden: Path) -> dict[str, np.ndarray]:
    """A transcription of darknet's GPU code, made by others: see the README of shared/darknet/fixtures."""
    with np.load(golden) as file:
        return {name: file[name].astype(np.float64) for name in file.files}


def assert_darknets(numbers: dict[str, np.ndarray], made: list[tuple], tolerance: float) -> None:
    """made: per mini-batch (out, dx, dgamma, dbeta, rolling mean, rolling variance)."""
    names = ("y", "dx", "dgamma_cum", "dbeta_cum", "rolling_mean", "rolling_var")
    columns = dict(zip(names, (np.array(column) for column in zip(*made, strict=True)), strict=True))
    for name in ("dgamma_cum", "dbeta_cum"):
        columns[name] = columns[name].cumsum(0)
    for name, column in columns.items():
        np.testing.assert_allclose(column, numbers[name], rtol=tolerance, atol=tolerance, err_msg=name)


def run_darknets(numbers: dict[str, Any], dtype: torch.dtype) -> list[tuple]:
    """As `assert_darknets` wants it, from one batch, with rolling statistics that start at 0."""
    norm = DarknetCrossMiniBatchNorm(len(numbers["gamma"]), eps=1e-5, momentum=0.01).to(dtype)
    norm.load_state_dict(
        {"weight": torch.tensor(numbers["gamma"]), "bias": torch.tensor(numbers["beta"])}, strict=False
    )
    norm.running_var.zero_()
    made, rolling = [], []
    for index, x in enumerate(BatchClock(norm).minibatches([torch.tensor(x, dtype=dtype) for x in numbers["x"]])):
        if index > 0:  # the announcement has just moved the rolling statistics
            rolling.append(arrays(norm.running_mean, norm.running_var))
        norm.zero_grad()
        out = norm(x.requires_grad_())
        out.backward(torch.tensor(numbers["grad_y"][index], dtype=dtype))
        made.append(arrays(out, x.grad, norm.weight.grad, norm.bias.grad))
    rolling.append(arrays(norm.running_mean, norm.running_var))
    assert norm.num_batches_tracked == len(made)
    return [(*a, *b) for a, b in zip(made, rolling, strict=True)]


def by_oracle(numbers: dict[str, Any]) -> list[tuple]:
    return oracle.darknet_cmbn(
        numbers["x"],
        numbers["grad_y"],
        numbers["gamma"],
        numbers["beta"],
        eps=1e-5,
        momentum=0.01,
        rolling_mean=0.0,
        rolling_var=0.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_darknets_numbers_are_reproduced(root: Path, dtype):
    numbers = darknets_numbers(root / "tests" / "golden" / "darknet_cmbn.npz")
    assert_darknets(numbers, run_darknets(numbers, dtype), 1e-5)


def test_the_golden_numbers_are_the_shared_ones(root: Path, shared: Path):
    theirs = darknets_numbers(shared / "darknet" / "fixtures" / "cbn_reference.npz")
    golden = darknets_numbers(root / "tests" / "golden" / "darknet_cmbn.npz")
    assert golden.keys() == theirs.keys()
    assert all(np.array_equal(golden[name], theirs[name]) for name in golden)


def test_the_oracle_of_darknets_variant_is_right(root: Path):
    numbers = darknets_numbers(root / "tests" / "golden" / "darknet_cmbn.npz")
    assert_darknets(numbers, by_oracle(numbers), 1e-5)


def test_mini_batches_of_unequal_size_weigh_the_same_in_darknets_variant():
    """In darknet itself they cannot be unequal."""
    xs = [x.numpy() for x in parts()]
    gs = [noise_like(x, i).numpy() for i, x in enumerate(parts())]
    numbers = {"x": xs, "grad_y": gs, "gamma": np.array([0.5, -1, 2, 1]), "beta": np.array([0.1, 0, 3, -1])}
    for made, expected in zip(run_darknets(numbers, torch.float64), by_oracle(numbers), strict=True):
        for ours, theirs in zip(made, expected, strict=True):
            assert_agree(torch.tensor(ours), theirs)
