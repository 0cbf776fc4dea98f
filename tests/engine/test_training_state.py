"""A training goes on as if it had never stopped: what changes is saved together and put back together."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.amp import MixedPrecision
from engine.ema import ModelEMA
from engine.step import TrainStep
from engine.training_state import load_norm_histories, norm_histories, restore, training_state
from models.blocks import ConvNormAct
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from tests.toy_checkpoint import toy_checkpoint
from utils.checkpoint import Checkpoint, ResumeState
from utils.clock import BatchClock
from utils.seed import random_state, set_random_state


def model_with(norm: NormOptions) -> nn.Module:
    torch.manual_seed(5)
    factory = norm_factory(norm)
    return nn.Sequential(
        ConvNormAct.make(3, 4, 3, padding=1, norm=factory, activation=nn.LeakyReLU(0.1)),
        ConvNormAct.make(4, 4, 3, padding=1, groups=2, norm=factory, activation=nn.Identity()),
    )


NORMS = {
    "cbn": NormOptions(norm="cbn:window=3,burn_in_steps=1"),
    "cmbn": NormOptions(norm="cmbn"),
    "bn": NormOptions(norm="bn"),
    "mabn": NormOptions(norm="mabn"),
}


class Training:
    """A training step and its average, without what the tests do not use."""

    def __init__(self, norm: str) -> None:
        network = model_with(NORMS[norm])
        self.average = ModelEMA(network, decay=0.9)
        self.step = TrainStep(
            network=network,
            forward=network,
            criterion=None,
            recovery=None,
            clip_norm=None,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9),
            precision=MixedPrecision("off", torch.device("cpu")),
            clock=BatchClock(network),
        )


def train(state: Training, batches: list[torch.Tensor]) -> list[float]:
    losses = []
    for batch in batches:
        for part in state.step.clock.minibatches(batch.split(2)):
            loss = (state.step.network(part) - 1).square().mean()
            losses.append(loss.item())
            state.step.precision.scaler.scale(loss).backward()
        state.step.precision.step(state.step.optimizer)
        state.step.optimizer.zero_grad()
        state.step.clock.stepped()
        state.average.update(state.step.network, step=state.step.clock.step)
    return losses


@pytest.mark.parametrize("norm", NORMS)
def test_training_goes_on_as_if_never_stopped(tmp_path: Path, norm):
    batches = list(torch.randn(8, 4, 3, 5, 5))
    straight = Training(norm)
    expected = train(straight, batches)

    first = Training(norm)
    train(first, batches[:5])
    path = tmp_path / "last.pt"
    training = ResumeState(state=training_state(first.step, first.average), log={}, subdivisions=1)
    toy_checkpoint(weights=first.average.model.state_dict(), training=training).to_file(path)

    second = Training(norm)
    read = Checkpoint.from_file(path)
    restore(second.step, second.average, read.training.state, read.weights)
    assert second.step.clock.step == 5
    assert train(second, batches[5:]) == expected[10:]  # bit for bit
    for a, b in zip(second.average.model.parameters(), straight.average.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scales", [(1024.0, 1.0), (1.0, 1024.0), (1024.0, 1024.0)])
def test_averaged_gradients_follow_the_loss_scale(scales: tuple[float, float]):
    """--resume may be told another --amp; what mabn remembers of its gradients is as large as the losses were."""

    def state_at(scale: float) -> Training:
        state = Training("mabn")
        state.step.precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        return state

    batches = list(torch.randn(6, 4, 3, 5, 5))
    straight, before, after = state_at(1.0), state_at(scales[0]), state_at(scales[1])
    expected = train(straight, batches)
    train(before, batches[:4])
    restore(after.step, after.average, training_state(before.step, before.average), before.average.model.state_dict())
    assert train(after, batches[4:]) == pytest.approx(expected[8:], rel=1e-6)
    for a, b in zip(after.step.network.parameters(), straight.step.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_random_numbers_go_on_too(tmp_path: Path):
    draws = []
    toy_checkpoint(settings={"random": random_state()}).to_file(tmp_path / "x.pt")
    for _ in range(2):
        set_random_state(Checkpoint.from_file(tmp_path / "x.pt").settings["random"])
        draws.append((random.random(), np.random.random(), np.random.standard_normal(), torch.rand(3).tolist()))
    assert draws[0] == draws[1]


def test_without_its_histories_cbn_would_go_on_differently():
    """Else the test above would see nothing."""
    batches = list(torch.randn(6, 4, 3, 5, 5))
    first = Training("cbn")
    train(first, batches[:5])
    whole = training_state(first.step, first.average)
    (own,) = whole["ranks"]
    partial = {**whole, "ranks": [{**own, "norm_histories": {}}]}
    goes_on = []
    for saved in (whole, partial):
        state = Training("cbn")
        restore(state.step, state.average, saved, first.average.model.state_dict())
        goes_on.append(train(state, batches[5:]))
    assert goes_on[0] != goes_on[1]


def test_histories_are_what_state_dicts_leave_out():
    state = Training("cbn")
    train(state, list(torch.randn(3, 4, 3, 5, 5)))
    histories = norm_histories(state.step.network)
    assert {"0.norm.ring_cov", "1.norm.ring_patch", "0.norm.slot"} <= set(histories)
    assert not set(histories) & set(state.step.network.state_dict())
    assert histories["0.norm.ring_cov"].shape == (3, 4, 27) and histories["0.norm.ring_cov"].abs().sum() > 0

    fresh = model_with(NORMS["cbn"])
    load_norm_histories(fresh, histories)
    again = norm_histories(fresh)
    assert set(again) == set(histories)
    assert all(torch.equal(again[name], histories[name]) for name in histories)


def test_stock_norms_have_no_history():
    assert norm_histories(model_with(NORMS["bn"])) == {}
