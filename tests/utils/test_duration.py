"""Times as users type them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.duration import in_words, seconds_in
from utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h", 10800), ("90m", 5400), ("45s", 45), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172800), ("1H 30M", 0)],
)
def test_examples(text: str, seconds: float) -> None:
    if seconds:
        assert seconds_in(text) == seconds
    else:
        with pytest.raises(UserError):
            seconds_in(text)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_parts_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    assert seconds_in(f"{days}d{hours}h{minutes}m{seconds}s") == ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@pytest.mark.parametrize("text", ["", "90", "0s", "h", "-3h", "30m1h", "3 hours", "nan", "1e3s", "٣h"])
def test_what_is_not_a_time_is_refused_with_what_to_type(text: str) -> None:
    with pytest.raises(UserError, match=f"'{text}' is not a time: write 3h, 90m, 45s or 1h30m"):
        seconds_in(text)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (89.6, "1 min"),
        (600, "10 min"),
        (5369, "89 min"),
        (5400, "1:30 h"),
        (90000, "25:00 h"),
    ],
)
def test_a_time_to_wait_has_the_unit_that_fits(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
