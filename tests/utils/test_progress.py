"""Progress without a terminal."""

from __future__ import annotations

import pytest

from utils import progress
from utils.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("total", "of_total"), [(1500, " of 1,500"), (0, "")])
def test_a_line_comes_every_half_minute(clock, capsys, total, of_total):
    with Progress(total) as bar:
        for _ in range(1500):
            clock[0] += 0.0625
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    left = [f", {left} s left" if total else "" for left in (64, 34, 4)]
    assert lines == [
        f"{count:,}{of_total} images, 16.0 images/s{end}" for count, end in zip((481, 962, 1443), left, strict=True)
    ]


def test_a_line_has_no_carriage_return_and_says_what_is_done(clock, capsys):
    with Progress(100, unit="step", label="training", done=40) as bar:
        clock[0] += 31
        bar.advance(31, note="loss 3")
    assert capsys.readouterr().err == "training: 71 of 100 steps, 1.0 steps/s, 29 s left, loss 3\n"


def test_what_is_not_shown_says_nothing(clock, capsys):
    with Progress(100, is_shown=False) as bar:
        clock[0] += 31
        bar.advance()
        bar.say("a")
    assert capsys.readouterr() == ("", "")


def test_short_work_says_nothing_but_what_it_is_told(clock, capsys):
    with Progress(2) as bar:
        bar.advance()
        bar.say("a.png: 2 cats")
        bar.advance()
    assert capsys.readouterr() == ("a.png: 2 cats\n", "")


def test_closed_outputs_do_not_end_it(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    monkeypatch.setattr("sys.stdout", None)
    with Progress(2) as bar:
        bar.advance()
        bar.say("x")
    assert bar._done == 1
