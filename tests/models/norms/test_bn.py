"""Norms by a mini-batch's own moments, or by fixed ones: batch, group and frozen norm. And running statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.moments import Moments
from models.norms.running_stats import use_population
from tests.models.norms.kinds import (
    BATCH_STATISTICS,
    arrays,
    assert_agree,
    block,
    conv_then_norm,
    noise_like,
    parts,
    run_batch,
)
from tests.reference import norms as oracle
from utils.clock import BatchClock


def assert_forward_and_backward(module, x, by_oracle, relative=1e-12) -> None:
    """by_oracle: y, g, gamma, beta -> out, dx, dgamma, dbeta."""
    module.zero_grad()
    y, out = conv_then_norm(module, x)
    g = noise_like(out, 4)
    out.backward(g)
    expected = by_oracle(*arrays(y, g, module.norm.weight, module.norm.bias))
    for ours, theirs in zip((out, y.grad, module.norm.weight.grad, module.norm.bias.grad), expected, strict=True):
        assert_agree(ours, theirs, relative=relative)


@pytest.mark.parametrize("kind", ["bn", "bn-pooled", "syncbn"])
@pytest.mark.parametrize("announced", [True, False])
def test_batch_norm_is_its_formula(kind, announced):
    module = block(kind)

    def by_oracle(y, g, gamma, beta):
        eps = module.norm.eps
        return oracle.bn_forward(y, gamma, beta, eps), *oracle.bn_backward(y, g, gamma, eps)

    for x in BatchClock(module).minibatches(parts()) if announced else parts():
        assert_forward_and_backward(module, x, by_oracle)


@pytest.mark.parametrize(("kind", "groups"), [("gn", 2), ("ln", 1), ("in", 8)])
def test_group_norms_are_their_formula(kind, groups):
    module = block(kind)
    for x in parts():
        assert_forward_and_backward(
            module, x, lambda y, g, gamma, beta: oracle.gn(y, g, gamma, beta, groups, module.norm.eps)
        )


@pytest.mark.parametrize("training", [True, False])
def test_the_frozen_norm_is_affine(training):
    module = block("frozen").train(training)
    norm = module.norm
    before = {name: b.clone() for name, b in norm.named_buffers()}
    scale, shift = arrays(*(t.view(-1, 1, 1) for t in (norm.weight, norm.bias)))
    mean, var = arrays(*(t.view(-1, 1, 1) for t in (norm.running_mean, norm.running_var)))
    rstd = 1 / np.sqrt(var + norm.eps)

    def by_oracle(y, g, _gamma, _beta):
        hat = (y - mean) * rstd
        return hat * scale + shift, g * scale * rstd, (g * hat).sum((0, 2, 3)), g.sum((0, 2, 3))

    for x in BatchClock(module).minibatches(parts()):
        assert_forward_and_backward(module, x, by_oracle)
    assert all(torch.equal(b, before[name]) for name, b in norm.named_buffers())


# --- running statistics --------------------------------------------------------------------------------------

# darknet moves them after each mini-batch, mabn has others: see their files.
POOLING = [kind for kind in BATCH_STATISTICS if kind != "cmbn-darknet" and not kind.startswith("mabn")]


@pytest.mark.parametrize("kind", POOLING)
def test_running_statistics_are_averages_of_both_moments_over_whole_batches(kind):
    """More batches than 1 / momentum, so that the average ends and the exponential average begins."""
    module = block(kind)
    module.norm.momentum = 0.3
    clock, seen = BatchClock(module), []
    for step in range(6):
        batch = parts((1, 3, 2), hw=(3, 3), seed=step)
        run_batch(module, clock, batch)
        clock.stepped()
        seen.append([module.conv(x).detach().numpy() for x in batch])
        mean, var = oracle.running_by_batch(seen, 0.3)
        assert_agree(module.norm.running_mean, mean)
        assert_agree(module.norm.running_var, var)
        assert module.norm.num_batches_tracked == step + 1


@pytest.mark.parametrize("kind", POOLING)
def test_running_statistics_do_not_see_how_a_batch_was_cut(kind):
    whole = torch.cat(parts((2, 2, 2, 2)))
    seen = []
    for sizes in ((8,), (4, 4), (1,) * 8, (3, 5)):
        module = block(kind)
        run_batch(module, BatchClock(module), list(whole.split(sizes)))
        seen.append(module.norm)
    y = module.conv(whole)
    for norm in seen:
        assert_agree(norm.running_mean, y.mean((0, 2, 3)).detach())
        assert_agree(norm.running_var, y.var((0, 2, 3)).detach())


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_evaluation_after_one_batch_normalises_that_batch(kind):
    """The start of 0 and 1 leaves no trace; in darknet's variant it does, for hundreds of batches."""
    if kind == "cmbn-darknet":
        pytest.skip("darknet's rolling statistics start at 0 and move by a hundredth")
    module = block(kind)
    nn.init.ones_(module.norm.weight)
    nn.init.zeros_(module.norm.bias)
    batch = parts()
    run_batch(module, BatchClock(module), batch)
    out = module.eval()(torch.cat(batch))
    mean, square = out.mean((0, 2, 3)), out.square().mean((0, 2, 3))
    if not kind.startswith("mabn"):  # which takes no mean out
        assert mean.abs().max() < 1e-12
    torch.testing.assert_close(square, torch.ones_like(square), rtol=2e-2, atol=0)


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_a_population_can_be_adopted(kind):
    """Then evaluation normalizes that very population."""
    module = block(kind)
    assert isinstance(module.norm, BatchStatNorm)
    nn.init.ones_(module.norm.weight)
    nn.init.zeros_(module.norm.bias)
    whole = torch.cat(parts())
    use_population(module.norm, Moments.of(module.conv(whole)))
    out = module.eval()(whole)
    square = out.square().mean((0, 2, 3))
    torch.testing.assert_close(square, torch.ones_like(square), rtol=2e-2, atol=0)


def test_one_position_is_no_division_by_zero():
    """Where nn.BatchNorm2d raises; the variance of one value is 0, with N - 1 in the divisor or without."""
    for kind in POOLING:
        module = block(kind, size=1)
        run_batch(module, BatchClock(module), parts((1,), hw=(1, 1)))
        assert module.norm.running_var.tolist() == [0] * 8, kind
