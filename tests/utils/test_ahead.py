"""Items taken by a thread ahead of who asks for them."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.ahead import ahead


@given(st.lists(st.none() | st.integers()), st.integers(1, 9))
def test_items_stay_as_they_are_and_in_order(items: list[int | None], count: int):
    assert list(ahead((item for item in items), count)) == items


def test_no_more_than_so_many_are_taken_early():
    taken: list[int] = []

    def numbers() -> Generator[int, None, None]:
        for number in range(100):
            taken.append(number)
            yield number

    for number in ahead(numbers(), 3):
        assert len(taken) <= number + 1 + 3


def test_an_error_comes_after_the_items_before_it():
    def failing() -> Generator[int, None, None]:
        yield 1
        raise ValueError("broken")

    items = ahead(failing(), 5)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_who_stops_early_leaves_no_thread_and_an_ended_source():
    is_closed = threading.Event()

    def endless() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            is_closed.set()

    before = threading.active_count()
    items = ahead(ahead(endless(), 2), 2)
    assert next(items) == 0
    items.close()
    assert is_closed.is_set() and threading.active_count() == before
