"""CBN-lite: where it is CBN exactly, and elsewhere its chain of ratios in NumPy."""

from __future__ import annotations

import pytest
import torch

from tests.models.norms.kinds import CBN, LITE, arrays, assert_agree, block, noise_like, parts, tuned
from tests.models.norms.test_cbn import train
from tests.reference import cbn as window
from tests.reference import norms as oracle
from utils.clock import BatchClock


@pytest.mark.parametrize("sizes", [(2,), (2, 1), (1, 2, 1)])
@pytest.mark.parametrize("refresh_steps", [1, 2, 3])
@pytest.mark.parametrize("gradient", ["share", "renorm"])
@pytest.mark.parametrize(("groups", "size"), [(1, 3), (2, 1)])
def test_sigmas_are_chained_from_step_to_step(groups, size, gradient, refresh_steps, sizes):
    options = tuned(LITE, refresh_steps=refresh_steps, gradient=gradient)
    module = block(options, groups=groups, size=size)
    weights, shared = {}, {}
    for x, history in train(module, steps=7, sizes=sizes):
        now = history[-1]
        if now.step not in weights:  # the first mini-batch of a step
            weights[now.step] = now.weight
            shared[now.step] = shared.get(now.step - 1)
            if now.step % refresh_steps == 0:
                shared[now.step] = [window.covariance(*now.of_filter(f)[:2]) for f in range(8)]
        mean, var, count = window.lite_moments(history[-3:], weights, shared)
        module.zero_grad()
        out = module(x)
        gamma, beta = arrays(module.norm.weight, module.norm.bias)
        assert_agree(out, oracle.normalized(now.y, mean, var, gamma, beta, module.norm.eps), relative=1e-11)
        g = noise_like(out, 2)
        (dgamma,) = torch.autograd.grad(out, module.norm.weight, g, retain_graph=True)
        assert_agree(dgamma, oracle.affine_gradients(now.y, g.numpy(), mean, var, module.norm.eps)[0], relative=1e-11)
        y = torch.tensor(now.y)
        if gradient == "share":
            dx, _, _ = oracle.share_backward(now.y, g.numpy(), gamma, mean, var, count, module.norm.eps)
        else:
            dx, _, _ = oracle.renorm_backward(now.y, g.numpy(), gamma, mean, var, module.norm.eps)
        (dweight,) = torch.autograd.grad(out, module.conv.weight, g)
        conv = module.conv
        through_conv = torch.nn.grad.conv2d_weight(
            x, conv.weight.shape, torch.tensor(dx), conv.stride, conv.padding, conv.dilation, conv.groups
        )
        assert y.shape == out.shape
        assert_agree(dweight, through_conv.detach(), relative=1e-11)


# Where a covariance measured today is the past's own, or where any will do.
EXACT = {
    "one past mini-batch, of which the covariance is": ({"window": 2}, {}, (3,), None),
    "filters of one number, which can only be rescaled": ({}, {"groups": 4, "size": 1}, (2, 1), None),
    "filters that are rescaled": ({}, {}, (2, 1), 0.7),
}


@pytest.mark.parametrize("case", EXACT)
def test_measured_every_step_it_is_cbn(case):
    knobs, shape, sizes, factor = EXACT[case]
    lite = block(tuned(LITE, refresh_steps=1, **knobs), **shape)
    full = block(tuned(CBN, **knobs), **shape)
    clock = BatchClock(torch.nn.ModuleList([lite, full]))
    for step in range(5):
        for x in clock.minibatches(parts(sizes, seed=step)):
            torch.testing.assert_close(lite(x), full(x), rtol=1e-11, atol=1e-11)
        with torch.no_grad():
            move = 0.05 * noise_like(lite.conv.weight, step)
            for net in (lite, full):
                if factor is None:
                    net.conv.weight.add_(move)
                else:
                    net.conv.weight.mul_(factor)
        clock.stepped()


def test_elsewhere_it_is_near_cbn_and_nearer_than_no_compensation():
    nets = torch.nn.ModuleList([block(CBN), block(LITE), block(tuned(CBN, estimator="none"))])
    clock, distance = BatchClock(nets), [0.0, 0.0]
    for step in range(8):
        for x in clock.minibatches(parts((2, 1), seed=step)):
            full, *others = (net(x) for net in nets)
            distance = [d + (out - full).square().sum().item() for d, out in zip(distance, others, strict=True)]
        for net in nets:
            with torch.no_grad():
                net.conv.weight.add_(0.02 * noise_like(net.conv.weight, step))
        clock.stepped()
    assert 0 < distance[0] < 0.3 * distance[1]


def test_it_keeps_one_covariance():
    module = block(LITE)
    for x, _history in train(module, steps=1):
        module(x)
    assert module.norm.ring_cov.numel() == 0
    assert module.norm.shared_cov.shape == (8, 36) and module.norm.ring_patch.shape == (3, 1, 36)
