"""Which statistics normalize, and that frozen norms remember nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.norms.freeze_stats import StatisticsFreeze, use_batch_statistics
from models.norms.options import NormOptions, resolve_norm
from tests.models.norms.kinds import (
    BATCH_STATISTICS,
    BN_IN_INFERENCE,
    KINDS,
    assert_same_bits,
    block,
    parts,
    run_batch,
    state_of,
)
from utils.clock import BatchClock
from utils.errors import UserError

MOVING = ["bn", "bn-pooled", "cmbn-weights", "cmbn-darknet", "cbn-std", "cbn-lite", "mabn", "brn", "syncbn"]


@pytest.mark.parametrize(
    ("options", "modes"),
    [
        (NormOptions(), [True] * 8),
        (NormOptions(norm_eval=True), [False] * 8),
        (NormOptions(norm_freeze_after=1.0), [True] * 8),
        (NormOptions(norm_freeze_after=0.5), [True] * 4 + [False] * 4),
        (NormOptions(norm_freeze_after=0.3), [True] * 3 + [False] * 5),
        (NormOptions(norm_freeze_after=0.0), [False] * 8),
    ],
)
def test_the_mode_depends_on_the_step_alone(options, modes):
    network = nn.Sequential(block("cmbn-share"), block("bn"))
    regime = StatisticsFreeze(network, options, total_steps=8)
    for step in (*range(8), 2, 7):  # and after a resume
        network.train()  # as at the start of an epoch
        regime.set_mode(step)
        assert [made.norm.training for made in network] == [modes[step]] * 2
        assert all(made.training and made.conv.training for made in network)


@pytest.mark.parametrize("kind", ["gn", "none"])
def test_norms_without_batch_statistics_are_left_alone(kind):
    network = nn.Sequential(block(kind))
    StatisticsFreeze(network, NormOptions(norm_eval=True), total_steps=8).set_mode(0)
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("kind", [*BATCH_STATISTICS, "bn"])
def test_a_frozen_norm_is_its_evaluation_and_remembers_nothing(kind):
    """Announced or not, after a batch that left histories."""
    module = block(kind)
    clock = BatchClock(module)
    run_batch(module, clock, parts())
    clock.stepped()
    before = state_of(module)
    expected = copy.deepcopy(module).eval()
    regime = StatisticsFreeze(module, NormOptions(norm_freeze_after=0.5), total_steps=2)
    for seed in (1, 2):
        module.train()
        regime.set_mode(clock.step)
        batch = parts(seed=seed)
        for ours, x in zip(run_batch(module, clock, batch), batch, strict=True):
            assert torch.equal(ours, expected(x))
        clock.stepped()
    assert_same_bits(state_of(module), before)


@pytest.mark.parametrize("kind", MOVING)
def test_a_frozen_norm_has_gradients_and_no_history(kind):
    module = block(kind)
    StatisticsFreeze(module, NormOptions(norm_eval=True), total_steps=4).set_mode(0)
    held = sum(buffer.numel() for buffer in module.buffers())
    for x in BatchClock(module).minibatches(parts()):
        module(x.requires_grad_()).square().sum().backward()
        assert x.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert sum(buffer.numel() for buffer in module.buffers()) == held


@pytest.mark.parametrize("kind", MOVING)
def test_back_in_training_it_goes_on(kind):
    """The regime never does this; whoever thaws a norm finds it as it was."""
    thawed, never_frozen = block(kind), block(kind)
    clocks = BatchClock(thawed), BatchClock(never_frozen)
    for module, clock in zip((thawed, never_frozen), clocks, strict=True):
        run_batch(module, clock, parts(seed=1))
        clock.stepped()
    thawed.eval()
    run_batch(thawed, BatchClock(thawed, step=1), parts(seed=2))
    thawed.train()
    for ours, theirs in zip(
        run_batch(thawed, clocks[0], parts(seed=3)), run_batch(never_frozen, clocks[1], parts(seed=3)), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [kind for kind in BN_IN_INFERENCE if KINDS[kind].spec.name != "mabn"])
def test_a_mini_batchs_own_statistics_make_it_batch_norm(kind):
    module, stock = block(kind).eval(), nn.BatchNorm2d(8, eps=block(kind).norm.eps).double()
    stock.load_state_dict(module.norm.state_dict())
    use_batch_statistics(module)
    for x in parts((3, 1, 2)):
        torch.testing.assert_close(module(x), stock(module.conv(x)), rtol=1e-10, atol=1e-10)


def test_mabn_takes_the_mini_batchs_second_moment():
    module = block("mabn").eval()
    use_batch_statistics(module)
    for x in parts((3, 1)):
        y = module.conv(x)
        hat = y / (y.square().mean((0, 2, 3), keepdim=True) + module.norm.eps).sqrt()
        expected = hat * module.norm.weight.view(1, -1, 1, 1) + module.norm.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def test_one_value_per_channel_is_no_crash():
    module = block("bn", size=1).eval()
    use_batch_statistics(module)
    assert torch.isfinite(module(parts((1,), hw=(1, 1))[0])).all()


@pytest.mark.parametrize("kind", ["gn", "ln", "in", "none"])
def test_a_network_without_batch_statistics_has_none_of_batches(kind):
    with pytest.raises(UserError, match="no norm with running statistics"):
        use_batch_statistics(block(kind))


def test_frozen_from_the_start_and_from_later_on_contradict_each_other():
    with pytest.raises(UserError, match="--norm-freeze-after has nothing to add"):
        resolve_norm(NormOptions(norm_eval=True, norm_freeze_after=0.5))
    once = resolve_norm(NormOptions(norm_eval=True))
    assert resolve_norm(once) == once
