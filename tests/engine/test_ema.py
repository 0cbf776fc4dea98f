"""The averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.ema import ModelEMA


class Model(nn.Module):
    """A parameter, a buffer of floats, a counter, and a history that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("history", torch.zeros(4), persistent=False)

    def fill(self, value: float) -> Model:
        with torch.no_grad():
            for tensor in (self.weight, self.mean, self.count, self.history):
                tensor.fill_(value)
        return self


def test_constant_weights_stay():
    model = Model().fill(0.3)
    average = ModelEMA(model, decay=0.99)
    for step in range(1, 50):
        average.update(model, step=step)
    torch.testing.assert_close(average.model.weight, model.weight.detach(), rtol=1e-6, atol=0)


def test_the_average_is_the_one_by_hand():
    model = Model()
    average = ModelEMA(model, decay=0.7)
    expected = 0.0
    for step in range(1, 40):  # the decay stops to grow at step 20
        model.fill(step)
        average.update(model, step=step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        for tensor in (average.model.weight, average.model.mean):
            assert tensor.tolist() == pytest.approx([expected] * len(tensor), rel=1e-5)


def test_it_moves_toward_new_weights_and_arrives():
    average = ModelEMA(Model(), decay=0.9)
    new, before = Model().fill(1), 0.0
    for step in range(1, 200):
        average.update(new, step=step)
        now = average.model.weight[0].item()
        assert before <= now <= 1
        before = now
    assert before == pytest.approx(1)


def test_counters_are_copied_and_histories_left_out():
    average = ModelEMA(Model(), decay=0.9)
    average.update(Model().fill(7), step=1000)
    assert average.model.count.item() == 7 and average.model.count.dtype == torch.long
    assert average.model.mean[0].item() == pytest.approx(0.7)
    assert average.model.history.tolist() == [0, 0, 0, 0]


def test_a_history_of_another_size_does_not_matter():
    model, average = Model(), ModelEMA(Model(), decay=0.9)
    model.history.resize_(100)
    average.update(model, step=1)
    assert average.model.history.numel() == 4


@pytest.mark.parametrize("steps", [50, 500, 5000])
def test_whatever_the_length_it_is_the_middle_of_the_last_fifth_of_weights_that_move_steadily(steps):
    """The lag of an exponential average is its memory, a ninth."""
    model, average = Model(), ModelEMA(Model())
    for step in range(1, steps + 1):
        average.update(model.fill(step / steps), step=step)
    assert average.model.weight[0].item() == pytest.approx(0.9, abs=0.02)


def test_decay_zero_is_a_copy():
    average = ModelEMA(Model(), decay=0.0)
    average.update(Model().fill(0.1), step=1)
    assert torch.equal(average.model.weight, torch.full((3,), 0.1))


def test_the_copy_is_apart_frozen_and_in_eval_mode():
    model = Model().train()
    average = ModelEMA(model, decay=0.9)
    model.fill(5)
    assert average.model.weight.tolist() == [0, 0, 0]
    assert not average.model.training and model.training
    assert not average.model.weight.requires_grad and model.weight.requires_grad
