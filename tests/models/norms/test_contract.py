"""The contract every norm signs: its ten points, of which 7 is in test_gradients.py and 8 in test_compile.py.

Point 9, no knowledge of devices or ranks, is kept by there being no such word outside of models/norms/across_ranks.py.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from models.norms.batch_stat import BatchStatNorm
from models.norms.mabn import MovingAverageNorm
from tests.models.norms.kinds import (
    BATCH_STATISTICS,
    BN_IN_INFERENCE,
    CORE,
    DTYPES,
    KINDS,
    LAYOUTS,
    assert_same_bits,
    autocast,
    block,
    noise_like,
    parts,
    run_batch,
    state_of,
    steps,
    stock_block,
)
from utils.clock import BatchAware, BatchClock, Tick


def in_every_dtype_and_layout(kinds: list[str]) -> pytest.MarkDecorator:
    """All kinds in float64, where the tolerances are tight; in the others those that differ there."""
    others = [("float32", "NCHW"), ("float32", "channels_last"), ("bf16 autocast", "channels_last")]
    cases = [(kind, "float64", "NCHW") for kind in kinds]
    cases += [(kind, *other) for kind in kinds if kind in CORE for other in others]
    return pytest.mark.parametrize(("kind", "dtype", "layout"), cases)


# What torch's own kernels leave between layouts or batch sizes.
TOLERANCES = {"float64": 1e-11, "float32": 5e-5, "bf16 autocast": 2e-2}


def assert_close(ours, theirs, dtype: str) -> None:
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# --- 1: never announced, it is BN ----------------------------------------------------------------------------


@in_every_dtype_and_layout(BATCH_STATISTICS)
def test_never_announced_it_is_bn(kind, dtype, layout):
    module, stock = (made.to(memory_format=LAYOUTS[layout]) for made in _pair(kind, dtype))
    for x in parts(dtype=DTYPES[dtype], layout=LAYOUTS[layout]):
        grads = []
        for net in (module, stock):
            inputs = [x.requires_grad_(), *(p for p in net.parameters() if p.requires_grad)]
            with autocast(dtype):
                out = net(x)
            grads.append([out, *torch.autograd.grad(out, inputs, noise_like(out, 3))])
        for ours, theirs in zip(*grads, strict=True):
            assert ours.dtype == theirs.dtype
            scale = theirs.detach().abs().max()
            assert_close(ours / scale, theirs / scale, dtype)
    # Running statistics are at least float32's, in bfloat16 autocast too.
    ours, theirs = module.norm.state_dict(), stock.norm.state_dict()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert ours["num_batches_tracked"] == theirs["num_batches_tracked"] == 4


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_between_two_batches_it_is_bn_again_and_remembers_nothing(kind):
    module, undisturbed = block(kind), block(kind)
    for net in (module, undisturbed):
        for _ in steps(net):
            pass
    stock = stock_block(kind)
    stock.load_state_dict(module.state_dict())
    x = parts(seed=50)[0]
    torch.testing.assert_close(module(x), stock(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(module.norm.running_var, stock.norm.running_var, rtol=1e-11, atol=1e-11)
    module.load_state_dict(undisturbed.state_dict())
    assert_same_bits(state_of(module), state_of(undisturbed))


def _pair(kind: str, dtype: str) -> tuple[nn.Module, nn.Module]:
    module, stock = block(kind, dtype=DTYPES[dtype]), stock_block(kind, dtype=DTYPES[dtype])
    stock.load_state_dict(module.state_dict())
    return module, stock


# --- 2: evaluation -------------------------------------------------------------------------------------------


@in_every_dtype_and_layout(list(KINDS))
def test_eval_is_deterministic_and_independent_of_batch_mates(kind, dtype, layout):
    module = block(kind, dtype=DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
    for _ in steps(module, count=2, dtype=dtype, layout=layout):
        pass
    module.eval()
    (x,) = parts((4,), dtype=DTYPES[dtype], layout=LAYOUTS[layout])
    with autocast(dtype):
        together, again, alone = module(x), module(x), module(x[:1])
    assert torch.equal(together, again)
    assert_close(together[:1], alone, dtype)


@pytest.mark.parametrize("kind", BN_IN_INFERENCE)
def test_eval_uses_the_running_statistics_as_bn_does(kind):
    module = block(kind)
    for _ in steps(module):
        pass
    stock = stock_block(kind)
    stock.load_state_dict(module.state_dict())
    x = parts()[0]
    torch.testing.assert_close(module.eval()(x), stock.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_leave_no_trace_in_training(kind):
    plain, visited = block(kind), block(kind)

    def visit(_: object) -> None:
        visited.eval()
        visited(parts(seed=77)[2])
        visited.train()

    expected = [out for out, _ in steps(plain)]
    seen = [out for out, _ in steps(visited, before_each=visit)]
    assert all(torch.equal(a, b) for a, b in zip(expected, seen, strict=True))
    assert_same_bits(state_of(visited), state_of(plain))


# --- 3: a second forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_backward", [False, True], ids=["forward", "and backward"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("bn") or kind == "bn-pooled"])
def test_a_stray_pass_within_a_tick_changes_nothing_that_follows(kind, with_backward):
    """Stock BN cannot promise that: its running statistics move at each forward."""
    once, twice = block(kind, dtype=torch.float32), block(kind, dtype=torch.float32)

    def stray(x: torch.Tensor) -> None:
        grads = [p.grad for p in twice.parameters()]
        for p in twice.parameters():
            p.grad = None
        out = twice(noise_like(x, 99)[:, :, :4] * 3 + 5)
        if with_backward:
            (1e3 * out.square()).sum().backward()
        for p, grad in zip(twice.parameters(), grads, strict=True):
            p.grad = grad

    expected = steps(once, dtype="float32")
    for mine, theirs in zip(steps(twice, dtype="float32", before_each=stray), expected, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(mine[1], theirs[1], strict=True))
    assert_same_bits(state_of(twice), state_of(once))


# --- 4: the state dict ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_the_state_dict_is_bns(kind):
    module = block(kind)
    for _ in steps(module):  # histories are allocated by now
        pass
    stock = nn.BatchNorm2d(8).double()
    assert list(module.norm.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(module.norm.state_dict())
    block(kind).norm.load_state_dict(stock.state_dict())


# --- 5: dtypes and layouts -----------------------------------------------------------------------------------


@in_every_dtype_and_layout(list(KINDS))
def test_dtype_and_layout_stay_and_statistics_are_at_least_float32(kind, dtype, layout):
    module = block(kind, dtype=DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
    normalised_in = torch.bfloat16 if dtype == "bf16 autocast" else DTYPES[dtype]
    seen = []
    if module.norm is not None:
        module.norm.register_forward_hook(lambda _module, args, out: seen.append((args[0], out)))
    for _, (dx, *grads) in steps(module, dtype=dtype, layout=layout):
        if module.norm is not None:
            y, out = seen[-1]
            assert y.dtype == normalised_in
            assert out.dtype == y.dtype
            assert out.is_contiguous(memory_format=LAYOUTS[layout]) and out.shape == y.shape
        assert dx.dtype == DTYPES[dtype] and torch.isfinite(dx).all()
        assert all(g is None or (g.dtype == DTYPES[dtype] and torch.isfinite(g).all()) for g in grads)
    floating = [b for b in module.buffers() if b.is_floating_point()]
    assert {b.dtype for b in floating} <= {DTYPES[dtype]}


@pytest.mark.parametrize("kind", CORE)
def test_the_layout_changes_no_number(kind):
    modules = [block(kind).to(memory_format=layout) for layout in LAYOUTS.values()]
    runs = [steps(module, layout=layout) for module, layout in zip(modules, LAYOUTS, strict=True)]
    for (a, of_a), (b, of_b) in zip(*runs, strict=True):
        for ours, theirs in zip((a, *of_a), (b, *of_b), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for name, value in state_of(modules[0]).items():
        torch.testing.assert_close(state_of(modules[1])[name], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_running_statistics_under_autocast_are_those_of_the_bfloat16_numbers(kind, layout):
    """To float32's digits: a mean or a square in bfloat16 would be off in the third."""
    module = block(kind, dtype=torch.float32).to(memory_format=LAYOUTS[layout])
    ys = []
    module.conv.register_forward_hook(lambda _module, _args, y: ys.append(y.detach().double()))
    with autocast("bf16 autocast"):
        run_batch(module, BatchClock(module), parts((4,), dtype=torch.float32, layout=LAYOUTS[layout]))
    (y,) = ys
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3))
    if isinstance(module.norm, MovingAverageNorm):
        mean, var = torch.zeros_like(mean), y.square().mean((0, 2, 3))
    if kind == "cmbn-darknet":
        count = y.numel() // 8
        rate = module.norm.momentum
        var = y.square().sum((0, 2, 3)) / (count - 1) - mean.square()
        mean, var = rate * mean, rate * var + (1 - rate)
    torch.testing.assert_close(module.norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.norm.running_var.double(), var, rtol=1e-5, atol=1e-6)


# --- 6: copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_like_the_original_and_apart_from_it(kind):
    module = block(kind)
    for _ in steps(module, count=2):
        pass
    before = state_of(module)
    twins = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    mine = [out for out, _ in steps(module, count=2, first_seed=2, clock=BatchClock(module, step=2))]
    for twin in twins:
        assert_same_bits(state_of(twin), before)
        theirs = [out for out, _ in steps(twin, count=2, first_seed=2, clock=BatchClock(twin, step=2))]
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert_same_bits(state_of(twin), state_of(module))


# --- 10: no counters of its own; and test_resume.py, where a fresh norm with the same tensors goes on alike --------


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_no_python_number_changes_in_training(kind):
    norm = block(kind).norm
    module = block(kind)
    for _ in steps(module):
        pass

    def numbers(of: nn.Module) -> dict[str, object]:
        kept = {k: v for k, v in vars(of).items() if k != "used_moments"}  # tensors, which nothing is computed from
        return {k: v for k, v in kept.items() if isinstance(v, int | float | tuple) and not isinstance(v, bool)}

    assert numbers(module.norm) == numbers(norm)


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_python_flags_say_no_more_than_the_last_announcement(kind):
    old, new = block(kind).norm, block(kind).norm
    for step in range(3):
        old.announce(Tick(step=step, index=0, count=1))
        old.batch_ended()
    for tick in (Tick(step=3, index=0, count=2), Tick(step=3, index=1, count=2)):
        for norm in (old, new):
            norm.announce(tick)
        flags = [{k: v for k, v in vars(norm).items() if isinstance(v, bool)} for norm in (old, new)]
        assert flags[0] == flags[1]


# --- and what follows from it --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in BATCH_STATISTICS if not kind.startswith("carried")])
def test_what_was_announced_but_never_forwarded_leaves_no_trace(kind):
    """Of a mini-batch after the first; a batch begins by forwarding. What a carried batch lends depends on how many
    mini-batches are to come."""
    plain, skipping = block(kind, dtype=torch.float32), block(kind, dtype=torch.float32)
    for step in range(3):
        xs = parts((2, 3), dtype=torch.float32, seed=step)
        for module, ticks in ((plain, (0, 1)), (skipping, (0, None, 1))):
            for place, index in enumerate(ticks):
                module.norm.announce(Tick(step=step, index=place, count=3))
                if index is not None:
                    out = module(xs[index])
                    out.square().sum().backward()
                    module.outputs = [*getattr(module, "outputs", [])[-1:], out.detach()]
            module.norm.batch_ended()
        for a, b in zip(plain.outputs, skipping.outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for name, value in plain.norm.state_dict().items():
        torch.testing.assert_close(skipping.norm.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_a_batch_left_early_leaves_no_trace_in_running_statistics(kind):
    module = block(kind)
    clock = BatchClock(module)
    before = {k: v.clone() for k, v in module.norm.state_dict().items()}
    for index, x in enumerate(clock.minibatches(parts())):
        module(x)
        if index == (0 if kind == "cmbn-darknet" else 1):  # darknet moves them after every mini-batch
            break
    assert_same_bits(module.norm.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_batch_statistics_norms_listen(kind):
    norm = block(kind).norm
    assert isinstance(norm, BatchAware) == isinstance(norm, BatchStatNorm) == (kind in [*BATCH_STATISTICS, "bcn"])
