"""CBN against its window in NumPy: estimators, gradients, and how the window fills and grows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from models.blocks import ConvNormAct
from models.norms.contract import ConvView
from models.norms.options import NormOptions
from models.norms.used_weight import used_weight
from tests.models.norms.kinds import (
    CBN,
    CONV_SHAPES,
    KINDS,
    arrays,
    assert_agree,
    block,
    conv_then_norm,
    cosine_to_filters,
    noise_like,
    parts,
    tuned,
)
from tests.reference import cbn as window
from tests.reference import norms as oracle
from utils.clock import BatchClock, Tick

EXACT = [  # covariances of all positions and a window of a fixed length
    kind for kind, options in KINDS.items() if options.spec.name == "cbn" and options.spec.positions == 0
]


HW = [(5, 4), (4, 6)]  # in turn, as with training at several scales


def train(
    module: ConvNormAct, *, steps: int = 4, sizes: tuple[int, ...] = (2, 1), noise: float = 0.05
) -> Iterator[tuple[Tensor, list[window.Seen]]]:
    """Announce steps of mini-batches -> (input, all that was seen so far, this mini-batch last).

    After each step the weights move by so much noise. That of conv and patches are NumPy's, not ours.
    """
    clock, history = BatchClock(module), []
    conv = module.conv
    for step in range(steps):
        for x in clock.minibatches(parts(sizes, hw=HW[step % 2], seed=step)):
            weight = used_weight(conv).detach().numpy().copy()
            y, patches = window.conv(
                x.numpy(), weight, stride=conv.stride[0], padding=conv.padding[0], groups=conv.groups
            )
            history.append(window.Seen(y, patches, weight, step))
            yield x.requires_grad_(), history
        with torch.no_grad():
            conv.weight.add_(noise * noise_like(conv.weight, step))
        clock.stepped()


def kept(module: ConvNormAct) -> int:
    return module.norm.window or 2  # of the mini-batches of a batch


def estimator_of(kind: str) -> str:
    return KINDS[kind].spec.estimator


@pytest.mark.parametrize(("groups", "stride", "size"), CONV_SHAPES)
@pytest.mark.parametrize("kind", EXACT)
def test_the_forward_pools_the_window_at_todays_weights(kind, groups, stride, size):
    if "centred" in kind and groups == 4:
        pytest.skip("a centred filter of one number is 0")
    module = block(kind, groups=groups, stride=stride, size=size)
    for x, history in train(module):
        _, out = conv_then_norm(module, x)
        mean, var, _ = window.moments(history[-kept(module) :], estimator_of(kind))
        gamma, beta = arrays(module.norm.weight, module.norm.bias)
        assert_agree(out, oracle.normalized(history[-1].y, mean, var, gamma, beta, module.norm.eps), relative=4e-12)


@pytest.mark.parametrize("kind", EXACT)
def test_the_backward_to_the_input_and_the_affine_part_is_its_formula(kind):
    module = block(kind)
    for x, history in train(module):
        module.zero_grad()
        y, out = conv_then_norm(module, x)
        out.backward(noise_like(out, 4))
        mean, var, count = window.moments(history[-kept(module) :], estimator_of(kind))
        values, gradient, gamma = history[-1].y, noise_like(out, 4).numpy(), arrays(module.norm.weight)[0]
        if "renorm" in kind:
            expected = oracle.renorm_backward(values, gradient, gamma, mean, var, module.norm.eps)
        else:
            expected = oracle.share_backward(values, gradient, gamma, mean, var, count, module.norm.eps)
        for ours, theirs in zip((y.grad, module.norm.weight.grad, module.norm.bias.grad), expected, strict=True):
            assert_agree(ours, theirs, relative=1e-11)


@pytest.mark.parametrize("kind", ["cbn-taylor", "cbn-taylor-weights", "cbn-taylor-renorm"])
def test_a_mini_batch_of_negative_variance_is_left_out_channel_by_channel(kind):
    """The current one never is. Steps as large as the weights, so that it does happen."""
    module = block(kind)
    left_out = set()
    for x, history in train(module, noise=0.3):
        out = module(x)
        mean, var, count = window.moments(history[-3:], "taylor")
        left_out |= set((count / sum(seen.y[:, 0].size for seen in history[-3:])).round(3).tolist())
        gamma, beta = arrays(module.norm.weight, module.norm.bias)
        expected = oracle.normalized(history[-1].y, mean, var, gamma, beta, module.norm.eps)
        assert_agree(out, expected, relative=1e-11)
        assert (module.norm.now_var[module.norm.slot] > 0).all()
    assert len(left_out) > 2  # shares of the window that were pooled: not always all, and not in all channels alike


# --- the gradient `weights` ----------------------------------------------------------------------------------


def by_autograd(module: ConvNormAct, x: Tensor, history: list[window.Seen], estimator: str) -> Tensor:
    """The output for x, with the filters attached in the formulas that bring the past to today's weights."""
    y, used = module.conv(x), used_weight(module.conv).flatten(1)
    rows = y.transpose(0, 1).flatten(1)
    counts, means, variances = [torch.full((8,), rows.shape[1])], [rows.mean(1)], [rows.var(1, correction=0)]
    for seen in history[:-1]:
        old = torch.tensor(seen.weight).flatten(1)
        # (C, positions) and (C, positions, K), constants
        values = torch.tensor(oracle.rows_of(seen.y))
        patches = torch.tensor(np.stack([seen.of_filter(f)[1] for f in range(8)]))
        mean = (patches.mean(1) * used).sum(1)
        if estimator == "std":
            centred = values - values.mean(1, keepdim=True)
            cov = (centred[..., None] * (patches - patches.mean(1, keepdim=True))).mean(1)
            ratio = (cov * used).sum(1) / (cov * old).sum(1)
            var = values.var(1, correction=0) * ratio.clamp(min=0).square()
        else:
            square = (values**2).mean(1) + 2 * ((values[..., None] * patches).mean(1) * (used - old)).sum(1)
            var = square - mean.square()
        counts.append(torch.where(var.detach() >= 0, rows.new_full((8,), values.shape[1]), 0))
        means.append(mean)
        variances.append(var)
    count, mean, var = torch.stack(counts), torch.stack(means), torch.stack(variances)
    share = count / count.sum(0)
    pooled = (share * mean).sum(0)
    pooled_var = (share * (var + mean.square())).sum(0) - pooled.square()
    hat = (y - pooled.view(-1, 1, 1)) / (pooled_var + module.norm.eps).sqrt().view(-1, 1, 1)
    return hat * module.norm.weight.view(-1, 1, 1) + module.norm.bias.view(-1, 1, 1)


@pytest.mark.parametrize("kind", ["cbn-std-weights", "cbn-std-weights-centred", "cbn-taylor-weights"])
@pytest.mark.parametrize(("groups", "stride", "size"), CONV_SHAPES)
def test_the_gradient_to_the_weights_goes_through_the_compensation(kind, groups, stride, size):
    if "centred" in kind and groups == 4:
        pytest.skip("a centred filter of one number is 0")
    module = block(kind, groups=groups, stride=stride, size=size)
    for x, history in train(module, noise=0.1):
        out = module(x)
        reference = by_autograd(module, x, history[-3:], estimator_of(kind))
        g, inputs = noise_like(out, 5), (x, *module.parameters())
        assert_agree(out, reference.detach(), relative=1e-11)
        got, want = (torch.autograd.grad(made, inputs, g) for made in (out, reference))
        for mine, theirs in zip(got, want, strict=True):
            assert_agree(mine, theirs, relative=1e-10)


def test_with_the_std_estimator_it_is_orthogonal_to_each_filter():
    """The pooled values scale with the filter, all of the window; with `taylor` they do not."""
    cosines = {}
    for kind in ("cbn-std-weights", "cbn-std-weights-centred", "cbn-taylor-weights", "cbn-std"):
        module = block(kind)
        module.norm.eps = 0.0
        for x, _history in train(module):
            module.zero_grad()
            out = module(x)
            out.backward(noise_like(out, 3))
            cosines[kind] = cosine_to_filters(module).abs().max()
    assert max(cosines["cbn-std-weights"], cosines["cbn-std-weights-centred"]) < 1e-11
    assert min(cosines["cbn-taylor-weights"], cosines["cbn-std"]) > 1e-4


# --- the estimator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [0, 6])
@pytest.mark.parametrize("factor", [0.3, 4.0])
def test_std_is_exact_when_the_weights_are_rescaled(factor, positions):
    """As weight decay does; from a grid too, whose covariance only has to point the right way."""
    module = block(tuned(CBN, positions=positions))
    clock, ys = BatchClock(module), []
    for step in range(3):
        for x in clock.minibatches(parts((2,), seed=step)):
            ys = [factor * y for y in ys] + [module.conv(x).detach()]
            y, out = conv_then_norm(module, x)
            rows = torch.cat([seen.transpose(0, 1).flatten(1) for seen in ys], dim=1)
            mean, var = arrays(rows.mean(1), rows.var(1, correction=0))
            gamma, beta = arrays(module.norm.weight, module.norm.bias)
            assert_agree(out, oracle.normalized(arrays(y)[0], mean, var, gamma, beta, module.norm.eps), relative=1e-11)
        with torch.no_grad():
            module.conv.weight.mul_(factor)
        clock.stepped()


def test_std_never_exceeds_the_variance_that_the_past_has_at_todays_weights():
    """Cauchy-Schwarz; and it is nearer to it than to leave the past as it was."""
    module = block("cbn-std")
    errors = {"std": 0.0, "none": 0.0}
    for x, history in train(module, noise=0.01):
        module(x)
        for seen in history[-3:-1]:
            for f in range(8):
                _, patches, _ = seen.of_filter(f)
                exact = (patches @ history[-1].weight[f].ravel()).var()
                made = {name: window.ESTIMATORS[name](seen, f, history[-1].weight[f].ravel())[1] for name in errors}
                assert 0 <= made["std"] <= exact * (1 + 1e-12)
                for name, var in made.items():
                    errors[name] += (var / exact - 1) ** 2
    assert errors["std"] < 0.2 * errors["none"]


# --- the window ----------------------------------------------------------------------------------------------


def test_only_mini_batches_within_reach_are_pooled():
    """Its own in a burn-in of 1 step, then a window of 4."""
    module = block(tuned(CBN, burn_in_steps=1, window=4))
    for x, history in train(module, steps=6, sizes=(1, 2)):
        out = module(x)
        reach = 4 if history[-1].step else 1
        mean, var, _ = window.moments(history[-reach:], "std")
        gamma, beta = arrays(module.norm.weight, module.norm.bias)
        expected = oracle.normalized(history[-1].y, mean, var, gamma, beta, module.norm.eps)
        assert_agree(out, expected, relative=4e-12)


@pytest.mark.parametrize("kind", ["cbn-std", "cbn-taylor-weights", "cbn-lite"])
def test_burn_in_is_batch_norm_and_remembers(kind):
    options = tuned(KINDS[kind], burn_in_steps=2)
    module, stock = block(options), block("bn")
    for x, history in train(module, steps=3):
        stock.conv.load_state_dict(module.conv.state_dict())
        assert torch.allclose(module(x), stock(x), atol=1e-11) == (history[-1].step < 2)
    assert (module.norm.ring_count > 0).all()


@pytest.mark.parametrize("norm", ["cbn", "cbn-lite"])
def test_a_window_of_zero_is_as_long_as_a_batch(norm):
    module = block(NormOptions(norm=f"{norm}:window=0,burn_in_steps=0"))
    for count in (3, 2):  # a later, shorter batch does not shorten it
        module.norm.announce(Tick(step=0, index=0, count=count))
        assert len(module.norm.ring_count) == 3 and module.norm.reach == count


@pytest.mark.parametrize("kind", [k for k, o in KINDS.items() if o.norm.startswith("cbn")])
def test_a_window_of_one_is_batch_norm(kind):
    gradient = KINDS[kind].spec.gradient
    module, stock = block(tuned(KINDS[kind], window=1)), block("bn")
    for x, _history in train(module):
        stock.load_state_dict(module.state_dict())
        stock.conv.weight.data.copy_(used_weight(module.conv))
        ours, theirs = (conv_then_norm(net, x) for net in (module, stock))
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-11)
        for _, out in (ours, theirs):
            out.backward(noise_like(out, 1))
        torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-9, atol=1e-11, msg=gradient)


@pytest.mark.parametrize("kind", ["cbn-std", "cbn-taylor"])
def test_the_past_is_brought_to_todays_weights_once_a_step(kind, monkeypatch):
    """It costs a pass over window copies of the weights, which stand still between."""
    module, calls = block(kind), []
    compensate = module.norm._compensate
    monkeypatch.setattr(module.norm, "_compensate", lambda view: calls.append(1) or compensate(view))
    for x, _history in train(module, steps=3, sizes=(1, 1, 2)):
        module(x)
    assert len(calls) == 3


def test_memory_is_what_the_docstring_says():
    module = block("cbn-std")
    for x, _history in train(module, steps=1):
        module(x)
    assert module.norm.ring_cov.shape == (3, 8, 36) and module.norm.ring_patch.shape == (3, 1, 36)
    naive = block("cbn-none")
    for x, _history in train(naive, steps=1):
        naive(x)
    assert naive.norm.ring_cov.numel() == naive.norm.ring_patch.numel() == 0


def test_a_view_with_no_gradient_to_the_weights_is_enough_for_share():
    """The gradient goes to y alone: what the view shows is detached, as the authors cut it."""
    module = block("cbn-std")
    for x, _history in train(module, steps=2):
        y = module.conv(x)
        out = module.norm(y.detach().requires_grad_(), ConvView(module.conv, x))
        assert torch.autograd.grad(out.sum(), module.conv.weight, allow_unused=True) == (None,)
