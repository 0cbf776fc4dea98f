"""Workers return results in order, whatever happens to them. Requests and results are plain values here."""

from __future__ import annotations

import errno
import gc
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from data.workers import Workers
from utils.errors import UserError

FORK = multiprocessing.get_context("fork")


def echo(request: Any) -> Any:
    """Return the request and this process's id; raise an error; call a function first."""
    if isinstance(request, Exception):
        raise request
    if callable(request):
        request = request()
    return request, os.getpid()


def die(left: Path | None = None, by: int = signal.SIGKILL) -> str:
    """Each time, or only while the folder `left` has a file: of these one goes each time."""
    files = [None] if left is None else sorted(left.iterdir())
    if files:
        if files[0] is not None:
            files[0].unlink()
        os.kill(os.getpid(), by)
    return "done"


@contextmanager
def workers(count: int = 2) -> Iterator[Workers]:
    made = Workers(echo, count)
    try:
        yield made
    finally:
        made.stop()


def results(made: Workers, requests: Any) -> list[Any]:
    return [result for result, _ in made.batches(requests)]  # type: ignore[misc]


def is_gone(pid: int) -> bool:
    """Ended; a zombie that nobody has waited for is, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def soon(condition: Callable[[], bool], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_answers_come_in_order_from_all_workers_again_and_again(count: int) -> None:
    with workers(3) as made:
        for _ in range(2):
            got = list(made.batches(iter(range(count))))
            assert [result for result, _ in got] == list(range(count))  # type: ignore[misc]
            assert {pid for _, pid in got} == set(made.pids[:count])  # type: ignore[misc]
            assert os.getpid() not in made.pids


def use_up_files() -> torch.Tensor:
    """Return a tensor that cannot be shared, because this process may open no more files."""
    lowest_free = os.dup(0)  # counting the open ones would leave the holes between them
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, lowest_free))
    return torch.zeros(9)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_too_many_open_files_are_told_as_what_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    with workers(1) as made, pytest.raises(OSError) as caught:
        results(made, [use_up_files])
    assert caught.value.errno == errno.EMFILE and "Traceback" not in capfd.readouterr().err


def test_no_more_is_asked_than_two_each_ahead() -> None:
    asked = []
    with workers(2) as made:
        batches = made.batches(asked.append(number) or number for number in range(100))  # type: ignore[func-returns-value]
        for taken in range(1, 4):
            next(batches)
            assert len(asked) == taken + 4


def test_an_iteration_left_early_leaves_nothing_to_the_next() -> None:
    with workers() as made:
        for _ in made.batches(range(9)):
            pids = made.pids
            break
        assert all(is_gone(pid) for pid in pids)
        assert made.pids == []
        older = made.batches(range(9))
        next(older)
        assert results(made, range(10, 15)) == [10, 11, 12, 13, 14]  # while somebody still holds the older one
        newer = made.batches(range(3))
        next(newer)
        with pytest.raises(AssertionError, match="newer iteration"):
            next(older)
        assert [result for result, _ in newer] == [1, 2]  # type: ignore[misc]


def test_errors_are_raised_where_the_answer_was_due() -> None:
    with workers() as made:
        batches = made.batches([1, UserError("no such image"), 3])
        next(batches)
        with pytest.raises(UserError, match=r"^no such image$"):
            next(batches)
        with pytest.raises(RuntimeError, match=r"raise request\nKeyError: 'x'"):
            results(made, [KeyError("x")])
        assert results(made, [4]) == [4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_are_the_main_process_s(number: int) -> None:
    with workers() as made:
        batches = made.batches(range(12))
        got = [next(batches)[0]]  # type: ignore[index]
        pids = made.pids
        for pid in pids:
            os.kill(pid, number)
        assert [*got, *(result for result, _ in batches)] == list(range(12))  # type: ignore[misc]
        assert made.pids == pids


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_worker_that_dies_is_replaced(tmp_path: Path, deaths: int, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(deaths):
        (tmp_path / str(number)).touch()
    with workers() as made, caplog.at_level(logging.WARNING):
        assert results(made, [0, 1, partial(die, tmp_path), 3, 4, 5, 6]) == [0, 1, "done", 3, 4, 5, 6]
    assert len(caplog.records) == deaths


class Dying(Dataset[int]):
    """The request that the others are given as a function: kills its worker while the folder has a file."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __getitem__(self, index: int) -> int:
        if index == 2:
            die(self.left)
        return index


def test_torchs_own_loader_loses_the_iteration_where_a_worker_dies(tmp_path: Path) -> None:
    """Why Workers exists. If this fails, torch has learned to replace a worker, and Workers may go."""
    (tmp_path / "0").touch()
    loader = DataLoader(Dying(tmp_path), batch_size=None, sampler=range(7), num_workers=2, multiprocessing_context=FORK)
    got = []
    with pytest.raises(RuntimeError, match=r"is killed by signal|exited unexpectedly"):
        for number in loader:
            got.append(int(number))
    assert len(got) < 7


def test_a_worker_that_always_dies_is_an_error() -> None:
    with workers() as made:
        with pytest.raises(UserError, match=r"died 4 times in a row \(SIGALRM\)"):
            results(made, [0, partial(die, by=signal.SIGALRM), 2])
        assert results(made, [1]) == [1]


def test_a_worker_that_is_killed_between_two_iterations_is_replaced() -> None:
    with workers() as made:
        assert results(made, range(4)) == [0, 1, 2, 3]
        for pid in made.pids:
            os.kill(pid, signal.SIGKILL)
        assert results(made, range(4)) == [0, 1, 2, 3]


def slow_start(pipe: Any) -> None:
    pipe.send([os.getpid()])
    time.sleep(1)


def leave(pipe: Any, wait: bool, is_start_slow: bool = False) -> None:
    """A main process that ends, or is killed, in the middle of an iteration, or while its workers start."""
    if is_start_slow:
        gc.freeze = partial(slow_start, pipe)  # the first that a worker does
    made = Workers(echo, 3)
    batches = made.batches(range(100))
    next(batches)
    pipe.send(made.pids)
    if wait:
        time.sleep(60)


@pytest.mark.parametrize("killed", [False, True])
def test_workers_end_with_their_main_process(killed: bool) -> None:
    ours, theirs = FORK.Pipe()
    main = FORK.Process(target=leave, args=(theirs, killed))
    main.start()
    pids = ours.recv()
    if killed:
        main.kill()
    main.join(20)
    assert main.exitcode == (-signal.SIGKILL if killed else 0)
    assert len(pids) == 3
    assert soon(lambda: all(is_gone(pid) for pid in pids))


def test_workers_end_with_a_main_process_that_is_killed_before_they_have_begun() -> None:
    ours, theirs = FORK.Pipe()
    main = FORK.Process(target=leave, args=(theirs, True, True))
    main.start()
    pids = [pid for _ in range(3) for pid in ours.recv()]
    main.kill()
    main.join(20)
    assert soon(lambda: all(is_gone(pid) for pid in pids))


def print_errors() -> str:
    """Report errors as the thread that shares tensors does: two that say the other end is gone, and another."""
    for error in (ConnectionResetError("gone"), EOFError("gone"), ValueError("another")):
        sys.excepthook(type(error), error, None)
    return "done"


def test_a_worker_whose_main_process_was_killed_prints_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with workers(1) as made:
        assert results(made, [print_errors]) == ["done"]
    printed = capfd.readouterr().err
    assert "another" in printed and "gone" not in printed
