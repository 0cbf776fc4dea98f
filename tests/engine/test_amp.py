"""Mixed precision, what of it can be tested on a CPU."""

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


@pytest.mark.parametrize(("kind", "chosen"), [("auto", "off"), ("off", "off"), ("bf16", "bf16")])
def test_the_kind_on_a_cpu(kind, chosen):
    assert MixedPrecision(kind, CPU).kind == chosen


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
def test_a_step_is_the_optimizers(kind):
    weight, optimizer = one_weight()
    precision = MixedPrecision(kind, CPU)
    for _ in range(2):  # two mini-batches of one batch
        precision.scaler.scale(weight.square().sum() / 2).backward()
    precision.step(optimizer)
    assert weight.tolist() == pytest.approx([3 - 0.2 * 3, 4 - 0.2 * 4])


@pytest.mark.parametrize("is_unscaled", [False, True])
def test_an_overflow_skips_the_update_and_lowers_the_scale(is_unscaled):
    weight, optimizer = one_weight()
    precision = scaled(1024.0)
    precision.scaler.scale(weight.sum() * float("inf")).backward()
    if is_unscaled:  # as for clipping
        precision.scaler.unscale_(optimizer)
    precision.step(optimizer)
    assert weight.tolist() == [3, 4]
    assert precision.scaler.get_scale() == 512


@pytest.mark.parametrize("is_unscaled", [False, True])
def test_loss_scaling_does_not_change_the_update(is_unscaled):
    weight, optimizer = one_weight()
    precision = scaled(1024.0)
    precision.scaler.scale(weight.square().sum() / 2).backward()
    if is_unscaled:
        precision.scaler.unscale_(optimizer)
        assert weight.grad.tolist() == [3, 4]
    precision.step(optimizer)
    assert weight.tolist() == pytest.approx([3 - 0.1 * 3, 4 - 0.1 * 4])


def scaled(scale: float) -> MixedPrecision:
    """What fp16 has on a GPU."""
    precision = MixedPrecision("off", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return precision
