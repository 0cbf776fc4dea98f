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
    assert lines == [f"{count:,}{of_total} images, 16.0 images/s" for count in (481, 962, 1443)]


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
