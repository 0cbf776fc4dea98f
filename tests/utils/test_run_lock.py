"""One process per run folder, which a killed process gives up by itself."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from utils import run_lock
from utils.errors import UserError
from utils.run_folder import free_folder
from utils.run_lock import hold, released_afterwards

HOLD = """
import os, sys, time
from pathlib import Path
from utils.run_lock import hold
hold(Path(sys.argv[1]))
print(1, flush=True)
"""

pytestmark = pytest.mark.skipif(run_lock.fcntl is None, reason="needs fcntl")


@pytest.fixture
def holder(root: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start another process that holds `tmp_path` and then runs this."""
    started: list[subprocess.Popen[bytes]] = []

    def start(then: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", HOLD + then, str(tmp_path)]
        started.append(subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == b"1\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_another_process_is_named_and_once_it_was_killed_the_folder_is_free(tmp_path: Path, holder) -> None:
    other = holder("time.sleep(60)")
    named = re.escape(f"{tmp_path}: is in use by process {other.pid} on {platform.node()};")
    for _ in range(2):  # looking does not take it away
        with pytest.raises(UserError, match=f"^{named}"):
            hold(tmp_path)
    with pytest.raises(UserError, match=f"^{named}"):
        free_folder(str(tmp_path), default="x")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    hold(tmp_path)
    hold(tmp_path)  # it is ours
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"


def test_a_folder_can_be_given_up_before_the_process_ends(tmp_path: Path, holder) -> None:
    with released_afterwards():
        hold(tmp_path)
    other = holder("time.sleep(60)")
    with pytest.raises(UserError, match=f"is in use by process {other.pid} on "):
        hold(tmp_path)


def test_a_fork_that_outlives_its_parent_does_not_keep_the_folder(tmp_path: Path, holder) -> None:
    """The loader's workers live on for a second, with the files they inherited."""
    other = holder("child = os.fork(); child and print(child, flush=True); time.sleep(60)")
    child = int(other.stdout.readline())
    other.kill()
    other.wait()
    try:
        hold(tmp_path)
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_in_which_a_run_only_began_is_free(tmp_path: Path, holder) -> None:
    holder("").wait()
    assert os.listdir(tmp_path) == [".lock"]
    assert free_folder(str(tmp_path), default="x") == tmp_path


def test_where_nothing_can_be_locked_nothing_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "fcntl", None)
    hold(tmp_path)
    assert os.listdir(tmp_path) == []
