"""Batch renormalization: values as by the running statistics, within limits that open in time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models.norms.kinds import BRN, arrays, assert_agree, block, conv_then_norm, noise_like, parts, tuned
from tests.reference import norms as oracle
from utils.clock import BatchClock, Tick


@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.2, 0.2), (1.0, 0.0)])
def test_it_is_its_formula_over_a_training(limits):
    r_max, d_max = limits
    schedule = {"burn_in_steps": 2, "ramp_steps": 3}
    module = block(replace(tuned(BRN, r_max=r_max, d_max=d_max, burn_in_steps=2, ramp_steps=3), norm_momentum=0.4))
    clock, batches = BatchClock(module), []
    clamped = free = 0
    for step in range(8):
        of_batch = []
        running = arrays(module.norm.running_mean, module.norm.running_var)
        if batches:
            expected = oracle.running_by_batch(batches, 0.4)
            assert_agree(module.norm.running_mean, expected[0])
            assert_agree(module.norm.running_var, expected[1])
        for index, x in enumerate(clock.minibatches(parts((2, 3, 1), seed=step))):
            module.zero_grad()
            y, out = conv_then_norm(module, x)
            g = noise_like(out, index)
            out.backward(g)
            now = oracle.brn_limits(step, r_max=r_max, d_max=d_max, **schedule)
            values, gradient, gamma, beta = arrays(y, g, module.norm.weight, module.norm.bias)
            theirs = oracle.brn(values, gradient, gamma, beta, *running, *now, module.norm.eps)
            for ours, wanted in zip((out, y.grad, module.norm.weight.grad, module.norm.bias.grad), theirs, strict=True):
                assert_agree(ours, wanted)
            of_batch.append(values)
            by_running = oracle.normalized(values, *running, gamma, beta, module.norm.eps)
            agree = abs(theirs[0] - by_running).max((0, 2, 3)) < 1e-9
            free, clamped = free + agree.sum(), clamped + (~agree).sum()
        with torch.no_grad():
            module.conv.weight.add_(0.02 * noise_like(module.conv.weight, step))
        batches.append(of_batch)
        clock.stepped()
    assert clamped > 0 and (free > 0) == (r_max > 1)


def test_the_limits_open_after_burn_in():
    module = block(tuned(BRN, burn_in_steps=2, ramp_steps=4, r_max=3.0, d_max=5.0))
    module.norm.num_batches_tracked.fill_(1)
    limits = []
    for step in range(8):
        module.norm.announce(Tick(step=step, index=0, count=1))
        limits.append((module.norm.r_max.item(), module.norm.d_max.item()))
    assert limits == [(1, 0), (1, 0), (1.5, 1.25), (2, 2.5), (2.5, 3.75), (3, 5), (3, 5), (3, 5)]


@pytest.mark.parametrize("ramp_steps", [0, 1])
def test_without_a_ramp_they_are_open_at_once(ramp_steps):
    norm = block(tuned(BRN, burn_in_steps=1, ramp_steps=ramp_steps)).norm
    norm.num_batches_tracked.fill_(1)
    for step, expected in ((0, 1.0), (1, 1.5), (2, 1.5)):
        norm.announce(Tick(step=step, index=0, count=1))
        assert norm.r_max == expected


def test_running_statistics_of_nothing_are_no_target():
    """The first batch without burn-in is plain batch norm's."""
    module, stock = block(tuned(BRN, ramp_steps=0)), block("bn")
    for x in BatchClock(module).minibatches(parts()):
        torch.testing.assert_close(module(x), stock(x), rtol=1e-11, atol=1e-11)
