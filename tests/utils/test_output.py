"""What is printed may be lost on a full disk or with its reader; the work is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = """
import sys
from utils.errors import exit_on_error
from utils.output import outlive_disk_and_reader
from utils.stop import Stop
def work():
    with Stop() as stop:
        for _ in range(3):
            print("word " * 99999, flush=True)
            print("word", file=sys.stderr)
    open(sys.argv[1], "w").write(f"done, {stop.requested}")
def alone():
    print("word " * 99999, flush=True)
    open(sys.argv[1], "w").write("done")
def hostile():
    print("a\\x1b]0;owned\\x07\\x9b2J\\rb", "c", sep="\\n")
def ends_hard():
    print("a line")
    os._exit(0)
import os
outlive_disk_and_reader()
exit_on_error(globals()[sys.argv[2]])
"""


def run(root: Path, mark: Path, page: str, **streams: object) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", PAGE, str(mark), page], cwd=root, **streams)  # type: ignore[call-overload]
    return done.returncode, mark.read_text() if mark.exists() else ""


@pytest.fixture(params=["pipe", "terminal"])
def without_reader(request: pytest.FixtureRequest):
    """A stream whose other end is closed."""
    read, write = os.pipe() if request.param == "pipe" else os.openpty()
    os.close(read)
    yield write
    os.close(write)


def test_a_line_is_in_the_log_before_the_page_ends(root: Path, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        run(root, tmp_path / "mark", "ends_hard", stdout=out)
    assert (tmp_path / "out").read_text() == "a line\n"


def test_control_characters_of_whatever_is_printed_do_not_reach_the_terminal(root: Path, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        assert run(root, tmp_path / "mark", "hostile", stdout=out)[0] == 0
    assert (tmp_path / "out").read_text() == "a\\x1b]0;owned\\x07\\x9b2J\\rb\nc\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("page", ["work", "alone"])
def test_on_a_full_disk_the_work_goes_on(root: Path, tmp_path: Path, page: str) -> None:
    with open("/dev/full", "wb") as full:
        code, mark = run(root, tmp_path / "mark", page, stdout=full, stderr=full)
    assert (code, mark) == (0, "done, False" if page == "work" else "done")


def test_without_a_reader_what_can_be_stopped_is_asked_to(root: Path, tmp_path: Path, without_reader: int) -> None:
    code, mark = run(root, tmp_path / "mark", "work", stdout=without_reader, stderr=without_reader)
    assert (code, mark) == (0, "done, True")


def test_without_a_reader_anything_else_ends_quietly(root: Path, tmp_path: Path, without_reader: int) -> None:
    code, mark = run(root, tmp_path / "mark", "alone", stdout=without_reader, stderr=without_reader)
    assert (code, mark) == (141, "")


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_streams_that_were_closed_before_the_start_are_no_files_later(
    root: Path, tmp_path: Path, closed: tuple[int, ...]
) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    code, mark = run(root, tmp_path / "mark", "work", preexec_fn=close)
    assert (code, mark) == (0, "done, False")
