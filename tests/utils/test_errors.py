"""How a page ends on an error."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import UserError, exit_on_error


def raising(error: Exception):
    def page() -> None:
        raise error

    return page


def test_a_users_error_is_one_line_and_exit_code_two(capsys):
    with pytest.raises(SystemExit) as caught:
        exit_on_error(raising(UserError("a.cfg:3: no such key")))
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: a.cfg:3: no such key\n")


def test_our_own_errors_keep_their_traceback():
    with pytest.raises(ValueError, match="ours"):
        exit_on_error(raising(ValueError("ours")))


def test_other_kinds_can_be_named(capsys):
    with pytest.raises(SystemExit):
        exit_on_error(raising(KeyError("x")), (UserError, KeyError))
    assert "error: 'x'" in capsys.readouterr().err


def test_a_page_that_ends_well_ends_quietly(capsys):
    called = []
    exit_on_error(lambda: called.append(1))
    assert called == [1] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kinds", [(UserError,), (UserError, OSError)])
def test_an_error_of_the_system_is_a_line_with_its_file(tmp_path: Path, capsys, kinds):
    with pytest.raises(SystemExit) as caught:
        exit_on_error(lambda: print((tmp_path / "gone.jpg").read_text()), kinds)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"error: {tmp_path / 'gone.jpg'}: No such file or directory\n")


@pytest.mark.parametrize("error", [OSError("ours"), OSError(5, "ours"), ConnectionResetError(104, "ours")])
def test_one_without_a_file_keeps_its_traceback(error):
    with pytest.raises(OSError, match="ours"):
        exit_on_error(raising(error))


@pytest.mark.parametrize(
    ("page", "unbuffered", "code"),
    [("print('word ' * 99999)", "", 141), ("print('word')", "1", 141), ("print('word')", "", 0), ("exit(1)", "", 1)],
)
def test_a_page_whose_reader_has_gone_is_quiet(root: Path, page: str, unbuffered: str, code: int):
    """One that meets it only when all is done has done it."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", f"from utils.errors import exit_on_error; exit_on_error(lambda: (print(1), {page}))"],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        cwd=root,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_users_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "a file could not be written: No space left"), (errno.EMFILE, "too many files are open: raise")],
)
def test_a_full_disk_and_a_full_table_of_files_are_a_line_wherever_they_are_met(capsys, number: int, said: str):
    with pytest.raises(SystemExit) as caught:
        exit_on_error(raising(OSError(number, os.strerror(number))))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
