"""Processes that make Batches side by side, and are started again when one of them dies.

Each has a pipe of its own. Those of torch's DataLoader write to one queue: a worker killed while it holds the queue's
lock stops them all, and the death itself is told by a SIGCHLD handler that raises wherever the main process happens
to be. Here it is the end of that worker's pipe, met where its next batch is due.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import cycle, islice
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

import cv2
import torch
from torch import multiprocessing  # registers how tensors travel: through shared memory

from utils.errors import UserError
from utils.structures import Batch

log = logging.getLogger(__name__)

_AHEAD = 2  # batches that each worker has in hand or in waiting
_MOST_DEATHS = 3  # in a row, without a batch in between
_LOOK_UP_S = 1.0  # how often an idle worker looks whether its main process is still there

Make = Callable[[Any], Batch]


class Workers:
    """`make` in `count` processes, which start with the first request and stay until `stop`, or for good."""

    def __init__(self, make: Make, count: int) -> None:
        self._make = make
        self._count = count
        self._running: list[_Worker] = []
        self._iteration: object = None
        # Before multiprocessing, leaving, waits for children whom its SIGTERM does not end.
        self._finalize = Finalize(self, _end, args=[self._running], exitpriority=10)

    def batches(self, requests: Iterable[Any]) -> Generator[Batch, None, None]:
        """`make(request)` for each, in their order, whoever dies meanwhile; one iteration at a time.

        Raises what `make` raises: a UserError as it is, anything else as a RuntimeError with its traceback; and a
        UserError when workers die again and again.
        """
        if self._iteration is not None:  # another was left in the middle, and nobody has closed it
            self.stop()
        mine = self._iteration = object()
        if not self._running:
            self._running += [_Worker(self._make) for _ in range(self._count)]
        left, turn, due = iter(requests), cycle(self._running), deque[_Worker]()
        try:
            for request, worker in zip(islice(left, _AHEAD * self._count), turn, strict=False):
                worker.ask(request)
                due.append(worker)
            while due:
                assert self._iteration is mine, "a newer iteration has taken the workers over"
                worker = due.popleft()
                batch = worker.answer()
                for request in islice(left, 1):
                    worker.ask(request)
                    due.append(worker)
                yield batch
            self._iteration = None
        finally:
            if self._iteration is mine:  # left early: what is under way is no answer to the next requests
                self.stop()

    def stop(self) -> None:
        """End the processes; the next request starts new ones."""
        self._iteration = None
        _end(self._running)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._running if worker.process.pid is not None]


class _Worker:
    """One process, its pipe, and the requests that it has not answered yet, oldest first."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._asked: deque[Any] = deque()
        self._start()

    def _start(self) -> None:
        """A new process, asked all that is still to be answered."""
        self._pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_work, args=(self._make, theirs, os.getpid()), daemon=True)
        # Ctrl-C, and a SIGTERM to a whole process group, reach workers too. The main process decides what they mean,
        # may want batches until then, and ends its workers by SIGKILL. A child inherits what is blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the pipe ends when the worker does
        for request in self._asked:
            self._send(request)

    def ask(self, request: Any) -> None:
        self._asked.append(request)
        self._send(request)

    def answer(self) -> Batch:
        """To the oldest request, by a new process if this one has died."""
        deaths = 0
        while True:
            try:
                answer = self._pipe.recv()
                break
            except (EOFError, OSError) as error:  # the pipe's end, or shared memory that nobody hands over any more
                deaths += 1
                self.end()
                if deaths > _MOST_DEATHS:
                    raise UserError(
                        f"a worker that loads images died {deaths} times in a row ({self._cause()}): SIGKILL mostly "
                        "means too little memory, SIGBUS too little shared memory (docker's --shm-size); try fewer "
                        "--workers, or 0"
                    ) from error
                log.warning("a worker that loads images died (%s), another takes its place", self._cause())
                self._start()
        self._asked.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def _send(self, request: Any) -> None:
        with suppress(OSError):  # it has died, which `answer` will meet
            self._pipe.send(request)

    def _cause(self) -> str:
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
    workers.clear()


def _work(make: Make, pipe: Connection, main: int) -> None:
    """The life of a worker, until the main process (its pid) is gone.

    A forked worker holds main's ends of its elders' pipes, which so do not end when main is killed. Whose child it is
    tells, and is compared with who started it: main may be gone before this begins.
    """
    # What the main process had made is shared until written to, and a garbage collection writes to all of it.
    gc.freeze()
    cv2.setNumThreads(0)  # workers are the parallelism
    torch.set_num_threads(1)
    while multiprocessing.get_start_method() != "fork" or os.getppid() == main:
        try:
            if pipe.poll(_LOOK_UP_S):
                pipe.send(_made(make, pipe.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _made(make: Make, request: Any) -> Batch | Exception:
    try:
        return make(request)
    except UserError as error:
        return error
    except Exception:
        return RuntimeError(f"in a worker that loads images:\n{traceback.format_exc()}")
