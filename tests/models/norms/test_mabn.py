"""MABN: averages over images, of second moments in the forward and of E[gamma g y_hat] in the backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models.norms.kinds import (
    MABN,
    arrays,
    assert_agree,
    block,
    conv_then_norm,
    noise_like,
    parts,
    run_batch,
    tuned,
)
from tests.reference import norms as oracle
from utils.clock import BatchClock


@pytest.mark.parametrize("average_images", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("kind", ["mabn", "mabn-uncentred"])
def test_it_is_its_formula_over_a_training(kind, average_images):
    """Two moving averages across batches, with weights that move and mini-batches of unequal size."""
    module = block(replace(tuned(MABN, average_images=average_images), weight_centralization=kind == "mabn"))
    clock, ys, gs = BatchClock(module), [], []
    gamma, beta = arrays(module.norm.weight, module.norm.bias)
    for step in range(4):
        for x in clock.minibatches(parts((2, 3, 1), seed=step)):
            module.zero_grad()
            y, out = conv_then_norm(module, x)
            g = noise_like(out, len(ys)) + y.detach()  # of which the product with y is not zero on average
            out.backward(g)
            ys.append(arrays(y)[0])
            gs.append(arrays(g)[0])
            theirs = oracle.mabn(ys, gs, gamma, beta, average_images, module.norm.eps)[-1]
            for ours, wanted in zip((out, y.grad, module.norm.weight.grad, module.norm.bias.grad), theirs, strict=True):
                assert_agree(ours, wanted)
        with torch.no_grad():
            module.conv.weight.add_(0.02 * noise_like(module.conv.weight, step))
        clock.stepped()


def test_averaged_over_one_image_it_takes_the_mini_batch_alone():
    """Then its gradient is the true derivative: q is the mini-batch's own."""
    module = block(tuned(MABN, average_images=1.0))
    for x in BatchClock(module).minibatches(parts(hw=(2, 3))):
        y = module.conv(x).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda t: module.norm(t), (y,))


def test_the_cut_of_a_batch_does_not_change_what_is_remembered_of_equal_images():
    """One setting means the same at every mini-batch size."""
    image = parts((1,))[0]
    kept = []
    for sizes in ((4,), (2, 2), (1, 1, 1, 1)):
        module = block("mabn")
        run_batch(module, BatchClock(module), parts((3,), seed=8))
        run_batch(module, BatchClock(module), [image.expand(n, -1, -1, -1).contiguous() for n in sizes])
        kept.append(module.norm.last_square / module.norm.last_square_weight)
    torch.testing.assert_close(kept[1], kept[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(kept[2], kept[0], rtol=1e-12, atol=0)


def test_running_statistics_are_second_moments_about_zero():
    """Averaged per batch as they are: of a mean of squares no degree of freedom was used up."""
    module = block("mabn")
    module.norm.momentum = 0.4
    clock, expected = BatchClock(module), None
    for step in range(5):
        batch = parts((2, 1), hw=(2, 2), seed=step)
        run_batch(module, clock, batch)
        clock.stepped()
        square = torch.cat([module.conv(x) for x in batch]).square().mean((0, 2, 3)).detach()
        rate = max(0.4, 1 / (step + 1))
        expected = square if expected is None else (1 - rate) * expected + rate * square
        assert_agree(module.norm.running_var, expected)
    assert module.norm.running_mean.tolist() == [0] * 8


def test_a_forward_that_is_not_differentiated_leaves_the_backward_average_alone():
    module = block("mabn")
    clock = BatchClock(module)
    for x in clock.minibatches(parts()):
        module(x).square().sum().backward()
    before = module.norm.last_product.clone()
    with torch.no_grad():
        run_batch(module, clock, parts(seed=4))
    assert torch.equal(module.norm.last_product, before) and before.abs().sum() > 0


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_in_the_backward_is_not_remembered(bad):
    """float16 training meets them by design: the scaler skips that step and halves its scale."""
    module, clean = block("mabn"), block("mabn")
    nets = torch.nn.ModuleList([module, clean])
    clock = BatchClock(nets)
    for step in range(3):
        for x in clock.minibatches(parts(seed=step)):
            for net in nets:
                net.zero_grad()
                x.grad = None
                out = net(x.requires_grad_())
                factor = bad if step == 1 and net is module else 1.0
                (factor * out.square()).sum().backward()
        clock.stepped()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    assert all(torch.isfinite(b).all() for b in module.buffers())
