"""Ghost batch norm: each part of a mini-batch by itself, running statistics by all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.norms.ghost import part_sizes
from models.norms.options import NormOptions
from tests.models.norms.kinds import arrays, assert_agree, block, conv_then_norm, noise_like, parts, run_batch
from tests.reference import norms as oracle
from utils.clock import BatchClock


@given(images=st.integers(0, 40), size=st.integers(1, 20), positions=st.integers(1, 9))
def test_no_part_is_a_single_value_and_all_but_the_last_are_equal(images, size, positions):
    sizes = part_sizes(images, size=size, positions=positions)
    assert sum(sizes) == images
    assert all(part * positions > 1 for part in sizes) or images * positions <= 1
    assert len(set(sizes[:-1])) <= 1
    if positions > 1:
        assert all(part == size for part in sizes[:-1]) and sizes[-1] <= size


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
def test_it_is_batch_norm_of_each_part(size):
    module = block(NormOptions(norm=f"ghost:size={size}"))
    for x in BatchClock(module).minibatches(parts((5, 1, 4))):
        module.zero_grad()
        y, out = conv_then_norm(module, x)
        g = noise_like(out, 4)
        out.backward(g)
        values, gradient, gamma, beta = arrays(y, g, module.norm.weight, module.norm.bias)
        expected, sums = [], [0, 0]
        for start in range(0, len(x), size):
            part, its = values[start : start + size], gradient[start : start + size]
            dx, dgamma, dbeta = oracle.bn_backward(part, its, gamma, module.norm.eps)
            expected.append((oracle.bn_forward(part, gamma, beta, module.norm.eps), dx))
            sums = [sums[0] + dgamma, sums[1] + dbeta]
        wanted = (*map(np.concatenate, zip(*expected, strict=True)), *sums)
        for ours, theirs in zip((out, y.grad, module.norm.weight.grad, module.norm.bias.grad), wanted, strict=True):
            assert_agree(ours, theirs)


@pytest.mark.parametrize("activation", [torch.nn.Mish(), torch.nn.SiLU()])
def test_parts_activate_too(activation):
    fused, apart = block("ghost", activation=activation), block("ghost")
    assert fused.norm_activates
    (x,) = parts((5,))
    ours, theirs = (run_batch(module, BatchClock(module), [x])[0] for module in (fused, apart))
    torch.testing.assert_close(ours, activation(theirs), rtol=1e-12, atol=1e-12)


def test_as_large_as_the_mini_batch_it_is_batch_norm_to_the_bit():
    ghost, pooled = block(NormOptions(norm="ghost:size=4")), block("bn-pooled")
    for ours, theirs in zip(*(run_batch(m, BatchClock(m), parts((4, 2))) for m in (ghost, pooled)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_one_position_an_image_and_no_image(images):
    module = block(NormOptions(norm="ghost:size=1"), size=1)
    (out,) = run_batch(module, BatchClock(module), parts((images,), hw=(1, 1)))
    assert out.shape == (images, 8, 1, 1) and out.isfinite().all()
    assert images < 2 or not torch.allclose(out, module.norm.bias.view(1, -1, 1, 1))  # what a single value becomes
