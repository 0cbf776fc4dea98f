import pytest

from utils.console import say, warn


def test_no_name_reaches_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    say("data", "\x1b[2J\rset\nforged")
    warn("\x07 \x9b31m \u202e")
    assert capsys.readouterr().out == "data      \\x1b[2J\\rset\\nforged\nwarning: \\x07 \\x9b31m \\u202e\n"
