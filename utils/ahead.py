"""Work beside its consumer: one thread takes from a generator ahead of who asks for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Generator[Item, None, None], count: int) -> Generator[Item, None, None]:
    """Yield the items in their order, taken by a thread up to `count` early; what it raises is raised in its place.

    Whoever stops early closes this generator, which closes `items` too.
    """
    end = object()
    with closing(items), ThreadPoolExecutor(1) as thread:
        taken = deque(thread.submit(next, items, end) for _ in range(count))
        try:
            while (item := taken.popleft().result()) is not end:
                taken.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]  # not the end
        finally:
            thread.shutdown(cancel_futures=True)
