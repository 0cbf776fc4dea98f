"""Eleven defects of the published CBN code (Howal/Cross-iterationBatchNorm, mmdet/models/utils/CBN.py), none of which
any norm here has. Each was reproduced with that code unmodified.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, is_tensor, nn

from engine.training_state import load_norm_histories, norm_histories
from models.norms.factory import norm_factory
from models.norms.mabn import MovingAverageNorm
from models.recompute import checkpointed
from tests.models.norms.kinds import (
    BATCH_STATISTICS,
    CONV_AWARE,
    CORE,
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
from utils.clock import BatchClock

every_kind = pytest.mark.parametrize("kind", KINDS)
ANNOUNCED = [True, False]
REMEMBERS_BATCHES = [kind for kind in BATCH_STATISTICS if kind.startswith(("cbn", "mabn"))]


def assert_trains(module: nn.Module, batches: list[list[Tensor]], *, announced: bool) -> None:
    """Two steps; whatever was made is finite, and so are the gradients and all that is remembered."""
    clock = BatchClock(module)
    for batch in batches:
        for x in clock.minibatches(batch) if announced else batch:
            x.grad = None
            out = module(x.requires_grad_())
            out.backward(noise_like(out, 1))
            assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()
        for p in module.parameters():
            if p.requires_grad:
                assert torch.isfinite(p.grad).all()
                with torch.no_grad():
                    p.add_(p.grad, alpha=-1e-3)
        clock.stepped()
    assert all(torch.isfinite(b).all() for b in module.buffers())
    assert torch.isfinite(module.eval()(batches[0][0])).all()


# --- 1 and 2: no variance ------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("announced", ANNOUNCED)
def test_1_a_dead_filter_has_a_gradient(kind, announced):
    module = block(kind, dtype=torch.float32)
    module.conv.weight.data[3] = 0
    assert_trains(module, [parts((1, 2, 1), dtype=torch.float32, seed=seed) for seed in range(3)], announced=announced)


@every_kind
@pytest.mark.parametrize(("value", "announced"), [(0.0, True), (1.7, True), (1e3, True), (1.7, False)])
def test_2_a_constant_input_gives_a_finite_output(kind, value, announced):
    module = block(kind, size=1, dtype=torch.float32)
    constant = [torch.full((n, 4, 3, 3), value) for n in (1, 2, 1)]
    assert_trains(module, [constant] * 3, announced=announced)


@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("case", ["one value", "huge mean", "tiny", "one channel dies", "one channel wakes"])
def test_2_so_do_other_degenerate_inputs(kind, case):
    if case == "one value" and kind in ("bn", "bn-centred", "in"):
        pytest.skip("torch raises")
    module = block(kind, size=1, dtype=torch.float32)
    batches = [parts((1, 2, 1), hw=(3, 3), dtype=torch.float32, seed=seed) for seed in range(4)]
    if case == "one value":
        batches = [[x[:1, :, :1, :1].contiguous() for x in batch] for batch in batches]
    elif case == "huge mean":
        batches = [[x + 1e4 for x in batch] for batch in batches]
    elif case == "tiny":
        batches = [[x * 1e-20 for x in batch] for batch in batches]
    else:
        with torch.no_grad():  # filter 2 sees channel 0 alone, which is 0 in half of the batches
            module.conv.weight[2, 1:] = 0
        if not kind.endswith("centred") and kind != "mabn":
            for batch in batches[2:] if case == "one channel dies" else batches[:2]:
                for x in batch:
                    x[:, 0] = 0
    assert_trains(module, batches, announced=True)


# --- 3 and 4: what is divided by -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_3_epsilon_is_inside_the_root(kind):
    """At a deviation of 5e-4, where outside it would be off by a factor."""
    for announced in ANNOUNCED:
        module, stock = block(kind), stock_block(kind)
        if announced and (kind in ("cmbn-darknet", "ghost") or isinstance(module.norm, MovingAverageNorm)):
            continue  # who divide by other numbers: see their oracles
        stock.load_state_dict(module.state_dict())
        (x,) = parts((4,))
        x = x * (5e-4 / module.conv(x).std())
        made = run_batch(module, BatchClock(module), [x])[0] if announced else module(x)
        torch.testing.assert_close(made, stock(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_4_burn_in_divides_by_the_biased_variance(kind):
    """So do all norms always, of a single mini-batch: the output has variance 1 and not 127/128."""
    module = block(kind)
    if kind == "cmbn-darknet" or isinstance(module.norm, MovingAverageNorm):
        pytest.skip("divides by another moment: see its oracle")
    nn.init.ones_(module.norm.weight)
    module.norm.eps = 0.0
    (out,) = run_batch(module, BatchClock(module), parts((2,)))
    torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(8).double(), rtol=1e-10, atol=0)


# --- 5: buffers ----------------------------------------------------------------------------------------------


@every_kind
def test_5_buffers_stay_where_they_are(kind):
    """DDP's list of buffers, CUDA graphs and aliases hold on to storages. Histories may be allocated at the first
    announcement, and stay since."""
    module = block(kind)
    persistent = {name: b.data_ptr() for name, b in module.named_buffers() if name in module.state_dict()}
    for _ in steps(module, count=1):
        pass
    places = {name: b.data_ptr() for name, b in module.named_buffers()}
    for _ in steps(module, count=3):
        pass
    module(parts()[0])
    assert {name: b.data_ptr() for name, b in module.named_buffers()} == places
    assert persistent.items() <= places.items()


# --- 6 and 7: who needs a gradient ---------------------------------------------------------------------------


@every_kind
def test_6_without_gradients_training_gives_the_same_output_and_statistics(kind):
    with_grad, without = block(kind), block(kind)
    for step in range(3):
        for x in parts((2, 1), seed=step):
            assert torch.equal(with_grad(x), torch.no_grad()(without)(x))
    clocks = BatchClock(with_grad), BatchClock(without)
    for step in range(3):
        expected = run_batch(with_grad, clocks[0], parts((2, 1), seed=step))
        with torch.no_grad():
            made = run_batch(without, clocks[1], parts((2, 1), seed=step))
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
        for clock in clocks:
            clock.stepped()
    assert_same_bits(state_of(with_grad), state_of(without))


@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("frozen", ["conv.weight", "norm.weight", "all"])
def test_7_frozen_parameters_and_a_trainable_input_work(kind, frozen):
    module, free = block(kind), block(kind)
    for name, p in module.named_parameters():
        p.requires_grad_(p.requires_grad and frozen not in (name, "all"))
    clock = BatchClock(nn.ModuleList([module, free]))
    for step in range(3):
        for x in clock.minibatches(parts((2, 1), seed=step)):
            gradients = []
            for net in (module, free):
                net.zero_grad()
                x.grad = None
                out = net(x.requires_grad_())
                out.backward(noise_like(out, step))
                gradients.append({"x": x.grad, **{n: p.grad for n, p in net.named_parameters() if p.requires_grad}})
            assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())
        clock.stepped()


def test_7_is_about_all_norms_that_see_the_convolution():
    assert len(CONV_AWARE) > 15 and set(CONV_AWARE) < set(KINDS)


# --- 8: resuming; test_resume.py has the whole of it ---------------------------------------------------------


@pytest.mark.parametrize("kind", REMEMBERS_BATCHES)
def test_8_burn_in_and_history_survive_resuming(kind):
    module, fresh, forgetful = (block(kind) for _ in range(3))
    for _ in steps(module, count=4):
        pass
    for net in (fresh, forgetful):
        net.load_state_dict(module.state_dict())
    load_norm_histories(fresh, copy.deepcopy(norm_histories(module)))
    first = [
        next(iter(steps(net, count=1, first_seed=4, clock=BatchClock(net, step=4))))[0]
        for net in (module, fresh, forgetful)
    ]
    assert torch.equal(first[0], first[1])
    assert not torch.allclose(first[0], first[2])  # else there was nothing to remember


# --- 9: activation checkpointing; test_resume.py has the whole of it ------------------------------------------


@every_kind
def test_9_activation_checkpointing_gives_the_same_numbers(kind):
    plain, recomputed = block(kind), block(kind)
    for (a, _), (b, _) in zip(steps(plain), steps(Recomputed(recomputed)), strict=True):
        assert torch.equal(a, b)
    assert_same_bits(state_of(plain), state_of(recomputed))


class Recomputed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self.layer, x, layers=[self.layer])


# --- 10 and 11: dtypes, layouts, starts, copies ----------------------------------------------------------------


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_10_autocast_leaves_statistics_in_float32(kind):
    """A mean of 30 and a deviation of 1: E[y^2] - E[y]^2 in bfloat16 would keep nothing of it."""
    module = block(kind, size=1, dtype=torch.float32)
    seen = []
    module.conv.register_forward_hook(lambda _m, _x, y: seen.append(y.detach()))
    with torch.no_grad():
        module.conv.weight.copy_(torch.eye(8)[:, :4, None, None] + torch.eye(8)[:, 4:, None, None])
    with autocast("bf16 autocast"):
        run_batch(module, BatchClock(module), [x - x.mean() + 30 for x in parts((8,), dtype=torch.float32)])
    assert seen[0].dtype == torch.bfloat16
    assert {b.dtype for b in module.buffers() if b.is_floating_point()} == {torch.float32}
    if kind != "cmbn-darknet" and not isinstance(module.norm, MovingAverageNorm):
        exact = seen[0].double().var((0, 2, 3))
        torch.testing.assert_close(module.norm.running_var.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["bn", *BATCH_STATISTICS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_10_large_populations_of_bfloat16_are_summed_in_float32(kind, layout):
    """In bfloat16 a sum of numbers about 5 ends at 2048: the next 5 is less than half a unit of its last place."""
    norm = norm_factory(KINDS[kind])(nn.Conv2d(4, 4, 1))
    norm = norm.to(memory_format=LAYOUTS[layout]).train()
    norm.momentum = 1.0
    x = (noise_like(torch.empty(4, 4, 64, 64), 1) + 5).bfloat16().to(memory_format=LAYOUTS[layout])
    with autocast("bf16 autocast"), torch.no_grad():
        out = norm(x)
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=0)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-3, atol=0)
    expected = nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_10_group_norm_sums_bfloat16_in_float32(layout):
    x = (noise_like(torch.empty(2, 4, 64, 64), 1) + 5).bfloat16().to(memory_format=LAYOUTS[layout])
    with autocast("bf16 autocast"), torch.no_grad():
        out = norm_factory(KINDS["gn"])(nn.Conv2d(4, 4, 1))(x)
    expected = nn.functional.group_norm(x.double(), 2)
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_11_the_output_keeps_its_layout(kind, layout):
    module = block(kind, dtype=torch.float32).to(memory_format=layout)
    batch = parts(dtype=torch.float32, layout=layout)
    for outputs in (run_batch(module, BatchClock(module), batch), [module(x) for x in batch]):
        assert all(out.is_contiguous(memory_format=layout) and out._base is None for out in outputs)


@every_kind
def test_11_gamma_starts_at_one_and_beta_at_zero(kind):
    norm = norm_factory(KINDS[kind])(nn.Conv2d(4, 8, 3))
    if norm is not None:
        assert norm.weight.tolist() == [1] * 8 and norm.bias.tolist() == [0] * 8


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_11_a_copy_made_before_training_holds_no_history(kind):
    """An average of weights is one; and so does a network made for inference."""
    module = block(kind)
    for net in (module, copy.deepcopy(module)):
        net.eval()(parts()[0])
        held = sum(b.numel() for b in net.norm.buffers())
        assert held < module.conv.weight.numel()
    for _ in steps(module.train()):
        pass
    # A window outlives the batch; what cmbn keeps does not.
    held = sum(
        t.untyped_storage().nbytes() for t in (*module.norm.buffers(), *vars(module.norm).values()) if is_tensor(t)
    )
    has_window = kind in CONV_AWARE and not kind.startswith(("cbn-none", "cmbn"))
    assert (held > module.conv.weight.nbytes) == has_window
