"""Batch-channel norm: estimated statistics, then groups of channels; the estimates are constants of the gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.norms.options import NormOptions
from tests.models.norms.kinds import assert_is_graph_of, block, normalized_by, parts, run_batch
from tests.reference import norms as oracle
from utils.clock import BatchClock

BCN = NormOptions(norm="bcn:groups=2", norm_momentum=0.3)


def second_affine(module: nn.Module) -> nn.Module:
    """With another gamma and beta in the group norm than it starts with."""
    nn.init.uniform_(module.norm.channel.weight, 0.5, 1.5)
    nn.init.uniform_(module.norm.channel.bias, -0.5, 0.5)
    return module


def then_groups(module: nn.Module, y: torch.Tensor) -> torch.Tensor:
    channel = module.norm.channel
    hat = F.group_norm(y, 2, None, None, channel.eps)
    return hat * channel.weight.view(-1, 1, 1) + channel.bias.view(-1, 1, 1)


@pytest.mark.parametrize("batches_before", [0, 1, 6])
def test_it_normalizes_by_the_statistics_that_the_batch_so_far_would_leave(batches_before):
    module = second_affine(block(BCN))
    clock, seen = BatchClock(module), []
    for step in range(batches_before):
        batch = parts((2, 1), seed=step)
        run_batch(module, clock, batch)
        clock.stepped()
        seen.append([module.conv(x).detach().numpy() for x in batch])
    batch = parts((2, 3, 1), seed=9)
    so_far = [module.conv(x).detach().numpy() for x in batch]

    def reference(t: int) -> torch.Tensor:
        estimate = oracle.running_from_start([*seen, so_far[: t + 1]], 0.3)
        return then_groups(module, normalized_by(module.norm, module.conv(batch[t]), *map(torch.from_numpy, estimate)))

    assert_is_graph_of(module, batch, reference)


def test_what_it_ends_with_is_what_inference_normalizes_by():
    module = second_affine(block(BCN))
    (x,) = parts((4,))
    (trained,) = run_batch(module, BatchClock(module), [x])
    torch.testing.assert_close(module.eval()(x), trained, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_never_announced_and_in_inference_it_is_batch_norm_then_group_norm(training):
    module = second_affine(block(BCN))
    run_batch(module, BatchClock(module), parts())
    stock = nn.BatchNorm2d(8, momentum=0.3).double()
    stock.load_state_dict({name: t for name, t in module.norm.state_dict().items() if not name.startswith("channel")})
    (x,) = parts((3,), seed=5)
    expected = then_groups(module, stock.train(training)(module.conv(x)))
    torch.testing.assert_close(module.train(training)(x), expected, rtol=1e-11, atol=1e-11)


def test_both_parts_have_gamma_and_beta():
    names = [name for name, _ in block(BCN).norm.named_parameters()]
    assert names == ["weight", "bias", "channel.weight", "channel.bias"]


def test_a_single_image_of_one_position():
    module = block(BCN, size=1)
    (out,) = run_batch(module, BatchClock(module), parts((1,), hw=(1, 1)))
    assert out.isfinite().all() and module.norm.running_var.isfinite().all()
