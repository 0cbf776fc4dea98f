"""The norms against slow oracles, and the contract every batch-statistics norm signs (house rules 1-10)."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from models.blocks import ConvNormAct
from models.norms.table import NORMS, NormOptions, largest_divisor, norm_factory
from tests.reference import norms as oracle
from utils.clock import BatchClock

KINDS = {
    "bn": NormOptions(norm="bn"),
    "cmbn": NormOptions(norm="cmbn", norm_gradient="weights"),
    "cmbn-share": NormOptions(norm="cmbn", norm_gradient="share"),
    "cbn": NormOptions(norm="cbn", norm_window=3, norm_burn_in_steps=0),
    "gn": NormOptions(norm="gn", norm_groups=2),
}
OURS = ("cmbn", "cmbn-share", "cbn")
BATCH_STATISTICS = ("bn", *OURS)
CONV_SHAPES = [(1, 1, 3), (2, 2, 3), (1, 1, 1), (4, 1, 3)]  # groups, stride, kernel


def block(kind: str, *, groups: int = 1, stride: int = 1, size: int = 3, dtype=torch.float64) -> ConvNormAct:
    torch.manual_seed(0)
    made = ConvNormAct.make(
        4,
        8,
        size,
        stride=stride,
        padding=size // 2,
        groups=groups,
        norm=norm_factory(KINDS[kind]),
        activation=nn.Identity(),
    ).to(dtype)
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 1.5)
        made.norm.bias.uniform_(-0.5, 0.5)
    return made


def parts(sizes=(2, 2, 3, 1), hw=(5, 4), dtype=torch.float64, seed=1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.5, 2.0, len(sizes))
    return [
        (torch.randn(n, 4, *hw, generator=generator, dtype=torch.float64) * s + s).to(dtype)
        for n, s in zip(sizes, scales, strict=True)
    ]


def run_batch(module: nn.Module, clock: BatchClock, batch: list[torch.Tensor]) -> list[torch.Tensor]:
    return [module(x) for x in clock.minibatches(batch)]


# --- against the oracles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cmbn", "cmbn-share"])
def test_cmbn_forward_pools_mini_batches_of_unequal_size(kind):
    module = block(kind)
    batch = parts()
    outputs = run_batch(module, BatchClock(module), batch)
    inputs = [module.conv(x).detach().numpy() for x in batch]
    gamma, beta = module.norm.weight.detach().numpy(), module.norm.bias.detach().numpy()
    expected = oracle.cmbn_forward(inputs, gamma, beta, module.norm.eps)
    for got, want in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-12, atol=1e-12)


def test_cmbn_share_backward_is_the_partial_derivative():
    norm = block("cmbn-share").norm
    generator = torch.Generator().manual_seed(3)
    ys = [torch.randn(n, 8, 3, 2, dtype=torch.float64, generator=generator) * (n + 1) for n in (2, 2, 3, 1)]
    gs = [torch.randn(y.shape, dtype=torch.float64, generator=generator) for y in ys]
    expected = oracle.cmbn_share_backward(
        [y.numpy() for y in ys], [g.numpy() for g in gs], norm.weight.detach().numpy(), norm.eps
    )
    clock = BatchClock(norm)
    for t, y in enumerate(clock.minibatches(ys)):
        y.requires_grad_()
        norm.zero_grad()
        norm(y).backward(gs[t])
        dx, dgamma, dbeta = expected[t]
        np.testing.assert_allclose(y.grad.numpy(), dx, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(norm.weight.grad.numpy(), dgamma, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(norm.bias.grad.numpy(), dbeta, rtol=1e-11, atol=1e-12)


def cmbn_by_autograd(module: ConvNormAct, batch: list[torch.Tensor], t: int) -> torch.Tensor:
    """Output of mini-batch t with every earlier one in the graph through the conv's weights."""
    ys = [module.conv(x if i == t else x.detach()) for i, x in enumerate(batch[: t + 1])]
    rows = torch.cat([y.transpose(0, 1).flatten(1) for y in ys], dim=1)
    mean, var = rows.mean(1), rows.var(1, correction=0)
    hat = (ys[-1] - mean.view(1, -1, 1, 1)) * torch.rsqrt(var + module.norm.eps).view(1, -1, 1, 1)
    return hat * module.norm.weight.view(1, -1, 1, 1) + module.norm.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize(("groups", "stride", "size"), CONV_SHAPES)
def test_cmbn_weights_gradient_equals_autograd_through_all_mini_batches(groups, stride, size):
    module = block("cmbn", groups=groups, stride=stride, size=size)
    batch = parts()
    generator = torch.Generator().manual_seed(5)
    for t, x in enumerate(BatchClock(module).minibatches(batch)):
        x.requires_grad_()
        out = module(x)
        g = torch.randn(out.shape, dtype=out.dtype, generator=generator)
        got = torch.autograd.grad(out, (x, module.conv.weight, module.norm.weight, module.norm.bias), g)
        reference = cmbn_by_autograd(module, batch, t)
        torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
        want = torch.autograd.grad(reference, (x, module.conv.weight, module.norm.weight, module.norm.bias), g)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_cmbn_weights_gradient_is_orthogonal_to_each_filter():
    module = block("cmbn")
    module.norm.eps = 0.0
    generator = torch.Generator().manual_seed(11)
    for x in BatchClock(module).minibatches(parts()):
        module.zero_grad()
        out = module(x)
        out.backward(torch.randn(out.shape, dtype=out.dtype, generator=generator))
        weight, gradient = module.conv.weight.flatten(1), module.conv.weight.grad.flatten(1)
        cosine = (weight * gradient).sum(1) / (weight.norm(dim=1) * gradient.norm(dim=1))
        assert cosine.abs().max() < 1e-10


@pytest.mark.parametrize(("groups", "stride", "size"), CONV_SHAPES)
def test_cbn_pools_compensated_statistics_across_steps(groups, stride, size):
    module = block("cbn", groups=groups, stride=stride, size=size)
    clock = BatchClock(module)
    generator = torch.Generator().manual_seed(7)
    history = []
    for seed in range(3):  # 3 steps of 2 mini-batches, a window of 3
        for x in clock.minibatches(parts((2, 1), seed=seed)):
            weight = module.conv.weight.detach().numpy().copy()
            y, patches = oracle.conv(x.numpy(), weight, stride=stride, padding=size // 2, groups=groups)
            history = [*history, (y, patches, weight)][-3:]
            mean, var = oracle.cbn_std_moments(history, weight, groups=groups)
            rstd = module.norm.weight.detach().numpy() / np.sqrt(var + module.norm.eps)
            want = (y - mean[:, None, None]) * rstd[:, None, None]
            want += module.norm.bias.detach().numpy()[:, None, None]
            np.testing.assert_allclose(module(x).detach().numpy(), want, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            noise = torch.randn(module.conv.weight.shape, generator=generator, dtype=torch.float64)
            module.conv.weight.add_(0.05 * noise)
        clock.stepped()


def test_cbn_is_bn_in_burn_in():
    options = NormOptions(norm="cbn", norm_window=4, norm_burn_in_steps=2)
    module, stock = block("cbn"), block("bn")
    module.norm = norm_factory(options)(module.conv).double()
    module.norm.load_state_dict(stock.norm.state_dict())
    clock = BatchClock(module)
    for step in range(3):
        for x in clock.minibatches(parts((2, 2), seed=step)):
            same = torch.allclose(module(x), stock(x), atol=1e-10)
            # in burn-in every mini-batch; after it the past weighs in
            assert same == (step < 2)
        clock.stepped()


# --- the contract ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OURS)
def test_never_announced_it_is_bn(kind):
    module, stock = block(kind), block("bn")
    for x in parts():
        x = x.requires_grad_()
        ours, theirs = module(x), stock(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        g = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad(ours, (x, *module.parameters()), g),
            torch.autograd.grad(theirs, (x, *stock.parameters()), g),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for name, value in stock.norm.state_dict().items():
        torch.testing.assert_close(module.norm.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_is_deterministic_and_independent_of_batch_mates(kind):
    module = block(kind)
    run_batch(module, BatchClock(module), parts())
    module.eval()
    x = parts((4,))[0]
    torch.testing.assert_close(module(x)[:1], module(x[:1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", OURS)
def test_a_second_forward_within_a_tick_changes_nothing_that_follows(kind):
    once, twice = block(kind), block(kind)
    clocks = BatchClock(once), BatchClock(twice)
    for step in range(3):
        batch, stray = parts(seed=step), iter(parts(seed=100 + step))
        expected = run_batch(once, clocks[0], batch)
        outputs = []
        for x in clocks[1].minibatches(batch):
            twice(next(stray))
            outputs.append(twice(x))
        assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))
        for clock in clocks:
            clock.stepped()
    for name, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name]), name


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_state_dict_has_bn_keys(kind):
    keys = set(block(kind).norm.state_dict())
    assert keys == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_in_bfloat16_out_with_float32_statistics(kind, layout):
    module = block(kind, dtype=torch.float32).to(memory_format=layout)
    clock = BatchClock(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in clock.minibatches(parts(dtype=torch.float32)):
            y = module.conv(x.contiguous(memory_format=layout))
            out = module(x.contiguous(memory_format=layout))
            if kind in BATCH_STATISTICS:
                assert out.dtype == y.dtype == torch.bfloat16
            out.float().sum().backward()
    assert all(b.dtype != torch.bfloat16 for b in module.norm.buffers())
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle_carry_on_alike(kind):
    module = block(kind)
    clock = BatchClock(module)
    run_batch(module, clock, parts())
    clock.stepped()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        batch = parts(seed=9)
        mine = run_batch(copy.deepcopy(module), BatchClock(twin), batch)
        assert all(torch.isfinite(out).all() for out in mine)
        first = run_batch(twin, BatchClock(twin, step=1), batch)
        again = copy.deepcopy(module)
        second = run_batch(again, BatchClock(again, step=1), batch)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["bn", "cmbn-share", "gn"])
def test_gradcheck(kind):
    """Where the gradient is the full derivative to the norm's input: every tick of a batch of three."""
    norm = block(kind).norm
    ys = [torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for y in BatchClock(norm).minibatches(ys):
        assert torch.autograd.gradcheck(
            lambda t, w, b: torch.func.functional_call(norm, {"weight": w, "bias": b}, t),
            (y, norm.weight, norm.bias),
        )


@pytest.mark.parametrize("kind", OURS)
def test_one_graph_however_many_ticks(kind):
    """Two at most: never announced, and announced (cmbn: with and without a successor)."""
    module = block(kind, dtype=torch.float32)
    compiles = []

    def backend(graph, _inputs):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True)
    clock = BatchClock(module)
    eager = copy.deepcopy(module)
    eager_clock = BatchClock(eager)
    for step in range(3):
        batch = parts((2,) * 12, dtype=torch.float32, seed=step)
        outputs = [compiled(x) for x in clock.minibatches(batch)]
        for a, b in zip(outputs, run_batch(eager, eager_clock, batch), strict=True):
            torch.testing.assert_close(a, b)
        clock.stepped()
        eager_clock.stepped()
    assert len(compiles) <= 2
    torch._dynamo.reset()


# --- running statistics, odd inputs ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OURS)
def test_running_statistics_pool_the_variance_between_mini_batches(kind):
    """One batch from a fresh norm: the running statistics are those of all its pictures, however it is cut."""
    whole = torch.cat(parts((2, 2, 2, 2)))
    seen = []
    for sizes in ((8,), (4, 4), (1,) * 8, (3, 5)):
        module = block(kind)
        run_batch(module, BatchClock(module), list(whole.split(sizes)))
        seen.append(module.norm.state_dict())
    y = module.conv(whole)
    torch.testing.assert_close(seen[0]["running_var"], y.var((0, 2, 3)), rtol=1e-10, atol=1e-10)
    for state in seen[1:]:
        torch.testing.assert_close(state["running_mean"], seen[0]["running_mean"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state["running_var"], seen[0]["running_var"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", OURS)
def test_a_batch_left_early_leaves_no_trace(kind):
    module = block(kind)
    clock = BatchClock(module)
    before = {k: v.clone() for k, v in module.norm.state_dict().items()}
    for x in clock.minibatches(parts()):
        module(x)
        break
    assert all(torch.equal(v, before[k]) for k, v in module.norm.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["dead filter", "constant input", "one value", "huge mean"])
def test_degenerate_channels_stay_finite(kind, case):
    module = block(kind, size=1, dtype=torch.float32)
    hw = (1, 1) if case == "one value" and kind != "bn" else (3, 3)
    batch = parts((1, 2, 1), hw=hw, dtype=torch.float32)
    if case == "dead filter":
        module.conv.weight.data[3] = 0
    if case == "constant input":
        batch = [torch.full_like(x, 1.7) for x in batch]
    if case == "huge mean":
        batch = [x + 1e4 for x in batch]
    clock = BatchClock(module)
    for _ in range(2):
        for x in clock.minibatches(batch):
            out = module(x.requires_grad_())
            out.square().sum().backward()
            assert torch.isfinite(out).all()
            assert torch.isfinite(x.grad).all()
        clock.stepped()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    assert all(torch.isfinite(b).all() for b in module.buffers())


@pytest.mark.parametrize("kind", OURS)
def test_history_is_not_allocated_outside_training(kind):
    module = block(kind)
    module.eval()(parts()[0])
    assert sum(b.numel() for b in module.norm.buffers()) < 60 + 8 * 8


def test_groups_fall_back_to_a_divisor():
    assert [largest_divisor(n, at_most=32) for n in (64, 255, 30, 1)] == [32, 17, 30, 1]


def test_a_knob_that_the_norm_does_not_read_is_refused():
    with pytest.raises(ValueError, match="--norm-window is read by cbn"):
        norm_factory(NormOptions(norm="bn", norm_window=4))
    with pytest.raises(ValueError, match="unknown norm 'batch'"):
        norm_factory(NormOptions(norm="batch"))


@pytest.mark.parametrize("name", NORMS)
def test_every_parameter_of_a_block_gets_a_gradient(name):
    made = ConvNormAct.make(4, 8, 3, norm=norm_factory(NormOptions(norm=name)), activation=nn.Mish())
    assert (made.conv.bias is not None) == (name == "none")
    made(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
