"""What the clock announces, to whom, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utils.clock import BatchAware, BatchClock, Tick


class Diary(nn.Module, BatchAware):
    def __init__(self) -> None:
        super().__init__()
        self.ticks: list[object] = []

    def announce(self, tick: Tick) -> None:
        self.ticks.append(tick)

    def batch_ended(self) -> None:
        self.ticks.append("end")


def tick(step: int, index: int, count: int) -> Tick:
    return Tick(step=step, index=index, count=count)


def test_each_mini_batch_is_announced_before_it_is_handed_out():
    diary = Diary()
    clock = BatchClock(nn.Sequential(nn.Linear(1, 1), nn.Sequential(diary)), step=7)
    seen = []
    for part in clock.minibatches("abc"):
        seen.append((part, diary.ticks[-1]))
    assert seen == [("a", tick(7, 0, 3)), ("b", tick(7, 1, 3)), ("c", tick(7, 2, 3))]
    assert diary.ticks[3:] == ["end"]


def test_the_step_moves_when_the_optimizer_has_stepped():
    diary = Diary()
    clock = BatchClock(diary)
    for _ in range(2):
        list(clock.minibatches([0]))
        clock.stepped()
    assert diary.ticks == [tick(0, 0, 1), "end", tick(1, 0, 1), "end"]
    assert clock.step == 2


def test_the_count_is_known_of_a_generator_too():
    diary = Diary()
    list(BatchClock(diary).minibatches(n for n in range(2)))
    assert diary.ticks == [tick(0, 0, 2), tick(0, 1, 2), "end"]


def test_a_loop_left_early_never_ends_its_batch():
    diary = Diary()
    clock = BatchClock(diary)
    for _ in clock.minibatches("abc"):
        break
    with pytest.raises(RuntimeError, match="inside"):
        for _ in clock.minibatches("abc"):
            raise RuntimeError("inside")
    assert diary.ticks == [tick(0, 0, 3), tick(0, 0, 3)]


def test_a_module_in_eval_mode_is_told_nothing():
    training, frozen = Diary(), Diary().eval()
    clock = BatchClock(nn.Sequential(training, frozen))
    list(clock.minibatches("ab"))
    assert (len(training.ticks), frozen.ticks) == (3, [])
    frozen.train()
    list(clock.minibatches("a"))
    assert frozen.ticks == [tick(0, 0, 1), "end"]


def test_a_shared_module_is_announced_to_once_and_a_late_one_never():
    diary, late = Diary(), Diary()
    model = nn.Sequential(diary, diary)
    clock = BatchClock(model)
    model.append(late)
    list(clock.minibatches([0]))
    assert diary.ticks == [tick(0, 0, 1), "end"]
    assert late.ticks == []


def test_a_listeners_own_parts_are_told_by_it_alone():
    outer = Diary()
    outer.inner = Diary()
    beside = Diary()
    list(BatchClock(nn.Sequential(outer, beside)).minibatches([0]))
    assert outer.ticks == beside.ticks == [tick(0, 0, 1), "end"]
    assert outer.inner.ticks == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5))
def test_a_domain_counts_the_mini_batches_that_have_it(domains):
    diary = Diary()
    list(BatchClock(diary, step=4).minibatches(range(len(domains)), domains))
    for domain in range(3):
        own = [each.of_domain(domain) for each in diary.ticks[:-1]]
        assert [each is not None for each in own] == [domain in here for here in domains]
        told = [each for each in own if each is not None]
        assert told == [tick(4, index, len(told)) for index in range(len(told))]
