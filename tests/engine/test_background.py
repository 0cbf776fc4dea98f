"""Listeners in threads of their own: slow ones, failing ones, ones that hang."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine import background
from engine.background import Background
from engine.events import Listener, Record, Run

RUN = Run(folder=Path("runs/a"), run_id="a", settings={}, step=0, epochs_done=0)


class Slow(Listener):
    """Takes in a step only when it is allowed to."""

    def __init__(self) -> None:
        self.gate, self.heard = threading.Event(), []

    def step(self, record: Record) -> None:
        self.gate.wait()
        self.heard.append(record.step)

    def end(self) -> None:
        self.heard.append("end")


def test_the_training_does_not_wait_for_a_slow_listener_but_the_end_does() -> None:
    slow = Slow()
    told = Background(slow, "slow")
    told.start(RUN)
    for step in range(1, 101):
        told.step(Record(step=step, epoch=1))
    assert slow.heard == []
    slow.gate.set()
    told.end()
    assert slow.heard == [*range(1, 101), "end"]


def test_one_that_hangs_is_left_behind_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    slow = Slow()
    told = Background(slow, "slow", last_s=0.05)
    told.start(RUN)
    told.step(Record(step=1, epoch=1))
    told.end()
    assert "warning: slow is not done after 0.05 s" in capsys.readouterr().out
    slow.gate.set()


def test_one_that_falls_far_behind_misses_steps_but_not_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background, "_MOST_WAITING", 3)
    slow = Slow()
    told = Background(slow, "slow")
    told.start(RUN)
    for step in range(1, 101):
        told.step(Record(step=step, epoch=1))
    threading.Timer(0.05, slow.gate.set).start()
    told.end()
    assert slow.heard[-1] == "end" and len(slow.heard) < 10
    assert "slow was too slow: 9" in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit(1)])
def test_one_that_fails_is_named_and_told_no_more(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Listener):
        def start(self, run: Run) -> None:
            raise error

    told = Background(Failing(), "failing")
    told.start(RUN)
    told.step(Record(step=1, epoch=1))
    told.end()
    told.error(ValueError())
    assert capsys.readouterr().out.count("warning: failing has failed and is told no more") == 1
