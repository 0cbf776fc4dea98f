"""Mixed precision, as far as a CPU can tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.amp import MixedPrecision
from utils.errors import UserError

CPU = torch.device("cpu")


def one_weight() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    return weight, torch.optim.SGD([weight], lr=0.1)


@pytest.mark.parametrize(("asked", "made"), [("auto", "off"), ("off", "off"), ("bf16", "bf16")])
def test_the_kind_on_a_cpu(asked, made):
    assert MixedPrecision(asked, CPU).kind == made


def test_float16_needs_a_gpu():
    with pytest.raises(UserError, match="--amp fp16 needs a GPU"):
        MixedPrecision("fp16", CPU)


@pytest.mark.parametrize(("kind", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_the_forward_runs_in_the_kinds_dtype(kind, dtype):
    conv = nn.Conv2d(1, 1, 1)
    with MixedPrecision(kind, CPU).autocast():
        assert conv(torch.zeros(1, 1, 2, 2)).dtype == dtype
    assert conv(torch.zeros(1, 1, 2, 2)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["off", "bf16"])
def test_a_step_is_the_optimizers_and_clears_the_gradient(kind):
    weight, optimizer = one_weight()
    precision = MixedPrecision(kind, CPU)
    for _ in range(2):  # two mini-batches of one batch
        precision.backward(weight.square().sum() / 2)
    precision.step(optimizer, [weight], clip_norm=None)
    assert weight.tolist() == pytest.approx([3 - 0.2 * 3, 4 - 0.2 * 4])
    assert weight.grad is None


@pytest.mark.parametrize(("clip_norm", "moved"), [(1.0, 0.1), (100.0, 0.5)])
def test_the_norm_of_the_gradient_is_clipped(clip_norm, moved):
    weight, optimizer = one_weight()
    precision = MixedPrecision("off", CPU)
    precision.backward(weight.square().sum() / 2)  # gradient (3, 4), of norm 5
    precision.step(optimizer, [weight], clip_norm=clip_norm)
    assert (weight.detach() - torch.tensor([3.0, 4.0])).norm().item() == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_overflow_skips_the_update_and_lowers_the_scale(clip_norm):
    weight, optimizer = one_weight()
    precision = MixedPrecision("off", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # what fp16 has on a GPU
    precision.backward(weight.sum() * float("inf"))
    precision.step(optimizer, [weight], clip_norm=clip_norm)
    assert weight.tolist() == [3, 4]
    assert precision.scaler.get_scale() == 512
    assert weight.grad is None


@pytest.mark.parametrize(("clip_norm", "moved"), [(None, 0.5), (1.0, 0.1)])
def test_loss_scaling_does_not_change_the_update(clip_norm, moved):
    weight, optimizer = one_weight()
    precision = MixedPrecision("off", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision.backward(weight.square().sum() / 2)
    precision.step(optimizer, [weight], clip_norm=clip_norm)
    assert (weight.detach() - torch.tensor([3.0, 4.0])).norm().item() == pytest.approx(moved, rel=1e-4)
