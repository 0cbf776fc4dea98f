"""The watch over the loss: what is lost, what is not, and that it continues after a resume."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.loss_watch import LossWatch, TrainingLost, remedies


def watch_all(watch: LossWatch, losses: list[float], start: int = 1) -> int:
    """The step at which the training is lost, 0 if it is not."""
    for step, loss in enumerate(losses, start):
        try:
            watch(step, loss)
        except TrainingLost:
            return step
    return 0


@given(st.lists(st.floats(1.0, 29.9), max_size=60))
def test_a_loss_that_varies_is_not_lost(losses: list[float]) -> None:
    assert watch_all(LossWatch(""), losses) == 0


def test_spikes_are_not_lost() -> None:
    assert watch_all(LossWatch(""), [100.0] * 20 + [1e9] * 4 + [90.0] * 20) == 0


@pytest.mark.parametrize("height", [4e3, 1e23])
def test_a_loss_that_has_risen_is_lost_within_ten_steps(height: float) -> None:
    assert 21 <= watch_all(LossWatch(""), [100.0] * 20 + [height] * 20) <= 30
    with pytest.raises(TrainingLost, match=r"step 26: the loss has risen from 100 to .*--optimizer adamw, a lower"):
        watch, losses = LossWatch(remedies(is_sgd=True, clip_norm=None)), [100.0] * 20 + [height] * 6
        for step, loss in enumerate(losses, 1):
            watch(step, loss)


@pytest.mark.parametrize("cut", [0, 3, 12, 22])
def test_a_resumed_training_is_lost_at_the_same_step(cut: int) -> None:
    losses = [100.0] * 20 + [1e6] * 20
    before, after = LossWatch(""), LossWatch("")
    assert watch_all(before, losses[:cut]) == 0
    after.load_state_dict(before.state_dict())
    assert watch_all(after, losses[cut:], start=cut + 1) == watch_all(LossWatch(""), losses)


@pytest.mark.parametrize(
    ("is_sgd", "clip_norm", "words"),
    [
        (True, None, "--optimizer adamw, a lower --learning-rate, --learning-rate auto or --clip-norm 10"),
        (False, None, "a lower --learning-rate, --learning-rate auto or --clip-norm 10"),
        (False, 5.0, "a lower --learning-rate, --learning-rate auto or a smaller --clip-norm"),
    ],
)
def test_only_what_is_not_done_yet_is_recommended(is_sgd: bool, clip_norm: float | None, words: str) -> None:
    assert remedies(is_sgd=is_sgd, clip_norm=clip_norm) == words
