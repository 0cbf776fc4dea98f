"""CmBN-W whose first mini-batches borrow from the batch before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.blocks import ConvNormAct
from models.norms.contract import ConvView
from models.norms.options import NormOptions
from models.norms.used_weight import used_weight
from tests.models.norms.kinds import (
    CONV_SHAPES,
    KINDS,
    assert_is_graph_of,
    block,
    cosine_to_filters,
    noise_like,
    normalized_by,
    parts,
    run_batch,
    tuned,
)
from utils.clock import BatchClock


def rows_of(y: Tensor) -> Tensor:
    return y.transpose(0, 1).flatten(1)


def by_autograd(module: ConvNormAct, last: list[Tensor], old: Tensor, batch: list[Tensor], t: int) -> Tensor:
    """Output of mini-batch t with everything in the graph that moves with the weights, and no patches.

    last: the batch before, made with the weights `old`. Its mean is linear in the weights, and cov(y, patch) . W is
    the covariance of what the weights made of it then and of what they make of it now.
    """
    conv, norm = module.conv, module.norm
    ys = [conv(x if i == t else x.detach()) for i, x in enumerate(batch[: t + 1])]
    rows = torch.cat([rows_of(y) for y in ys], dim=1)
    to_come = (len(batch) - 1 - t) * rows_of(ys[-1]).shape[1]
    kept = torch.cat(last[:-1])
    settings = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}
    now = rows_of(F.conv2d(kept, used_weight(conv), **settings))
    then = rows_of(F.conv2d(kept, old, **settings))
    then_var = then.var(1, correction=0)
    shared = ((then - then.mean(1, keepdim=True)) * (now - now.mean(1, keepdim=True))).mean(1)
    last_mean, last_var = now.mean(1), shared.square() / then_var
    share = to_come / (to_come + rows.shape[1])
    mean = rows.mean(1).lerp(last_mean, share)
    var = rows.var(1, correction=0).lerp(last_var, share) + share * (1 - share) * (last_mean - rows.mean(1)).square()
    return normalized_by(norm, ys[-1], mean, var)


def after_a_batch(kind: str | NormOptions, **shape: int) -> tuple[ConvNormAct, list[Tensor], Tensor]:
    """A block that has seen a batch and moved its weights since; the batch, and the weights from before."""
    module, last = block(kind, **shape), parts(seed=7)
    run_batch(module, BatchClock(module), last)
    old = used_weight(module.conv).detach().clone()
    with torch.no_grad():
        module.conv.weight.add_(noise_like(module.conv.weight, 3), alpha=0.1)
    return module, last, old


@pytest.mark.parametrize("kind", ["carried", "carried-centred"])
@pytest.mark.parametrize(("groups", "stride", "size"), CONV_SHAPES)
def test_output_and_gradients_are_those_of_a_graph_that_keeps_both_batches(kind, groups, stride, size):
    module, last, old = after_a_batch(kind, groups=groups, stride=stride, size=size)
    batch = parts()
    assert_is_graph_of(module, batch, lambda t: by_autograd(module, last, old, batch, t), relative=1e-10)


def test_without_a_batch_before_and_at_the_end_of_each_it_is_cmbn():
    carried, plain = block("carried"), block("cmbn-weights")
    clock = BatchClock(torch.nn.ModuleList([carried, plain]))
    for number in range(2):
        for t, x in enumerate(clock.minibatches(parts(seed=number))):
            ours, theirs = carried(x), plain(x)
            is_same = torch.allclose(ours, theirs, rtol=1e-11, atol=1e-11)
            assert is_same == (number == 0 or t == 3), (number, t)


def test_a_batch_of_one_mini_batch_neither_borrows_nor_lends():
    carried, plain = block("carried"), block("cmbn-weights")
    clock = BatchClock(torch.nn.ModuleList([carried, plain]))
    for sizes in ((2, 2), (4,), (2, 2)):
        for t, x in enumerate(clock.minibatches(parts(sizes, seed=len(sizes)))):
            if sizes == (4,) or t == 1:
                torch.testing.assert_close(carried(x), plain(x), rtol=1e-11, atol=1e-11)
            else:
                carried(x), plain(x)
    assert carried.norm.last_count == 2 * 20  # of the first of two mini-batches
    for _ in clock.minibatches(parts((4,))):
        carried(parts((4,))[0])
    assert carried.norm.last_count == 0


def test_every_mini_batch_but_the_last_sees_as_many_images():
    module, *_ = after_a_batch("carried")
    batch = parts((2, 2, 2, 2))
    last = parts((2, 2, 2, 2), seed=7)
    run_batch(module, BatchClock(module), last)
    seen = []
    for t, x in enumerate(BatchClock(module).minibatches(batch)):
        module(x)
        seen.append(float(module.norm.past_count + x.shape[0] * 20 * (1 + module.norm.remaining)))
        if t == 2:
            break
    assert seen == pytest.approx([8 * 20] * 3)


@pytest.mark.parametrize("hw", [(3, 2), (14, 12)])
def test_a_batch_of_another_size_stands_in_for_as_many_mini_batches(hw):
    """As multi-scale makes it: not its own positions count, but those that the mini-batches to come will have."""
    module = block("carried")
    clock = BatchClock(module)
    run_batch(module, clock, parts((2, 2, 2, 2), seed=7, hw=hw))
    for x in clock.minibatches(parts((2, 2, 2, 2))):
        module(x)
        own = module.norm.pool_of_batch()
        moments, past = module.norm._with_last_batch(own, ConvView(module.conv, x))
        break
    assert moments.count == 4 * own.count and past.share == 0.75


@pytest.mark.parametrize("positions", [0, 20])
def test_the_gradient_to_the_weights_is_orthogonal_to_each_filter(positions):
    module, *_ = after_a_batch(tuned(KINDS["carried"], positions=positions))
    module.norm.eps = 0.0
    for t, x in enumerate(BatchClock(module).minibatches(parts(hw=(7, 6)))):
        module.zero_grad()
        out = module(x)
        out.backward(noise_like(out, t))
        assert cosine_to_filters(module).abs().max() < 1e-10
