"""How a page ends on an error."""

from __future__ import annotations

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


def test_a_users_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
