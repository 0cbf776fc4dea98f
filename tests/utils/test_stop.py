"""Signals ask for a stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.stop import Stop


@pytest.mark.parametrize("number", Stop.SIGNALS)
def test_a_signal_is_a_request_and_handlers_are_put_back(number: int, capfd) -> None:
    before = signal.getsignal(number)
    with Stop() as stop:
        assert Stop.active is stop and not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert Stop.active is None and signal.getsignal(number) == before
    assert "stopping after this step" in capfd.readouterr().err


TWICE = """
import os, signal, sys
from utils.stop import Stop
with Stop() as stop:
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, name))
    print(stop.requested)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (["SIGINT", "SIGINT"], 130, ""),
        (["SIGHUP", "SIGTERM"], 143, ""),
        (["SIGHUP", "SIGHUP"], 0, "True\n"),
        (["SIGTERM", "SIGHUP"], 0, "True\n"),
    ],
)
def test_a_second_one_ends_at_once_but_not_the_second_hangup_of_a_terminal(root: Path, names, code, said) -> None:
    done = subprocess.run([sys.executable, "-c", TWICE, *names], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, said)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_under_nohup_a_hangup_is_ignored(root: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-c", TWICE, "SIGHUP"], cwd=root, capture_output=True, text=True, preexec_fn=ignore
    )
    assert (done.returncode, done.stdout) == (0, "False\n")
