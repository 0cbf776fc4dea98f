"""Processes that make Batches in parallel, and are restarted when they die.

Torch's DataLoader does not survive the death of a worker: its SIGCHLD handler raises a RuntimeError, wherever the main
process is, and the iteration is lost (`tests/data/test_workers.py` shows it). Its workers also share one queue, where a
worker killed while it holds the lock blocks all others. Here each worker has a pipe, and its death is the end of that
pipe, seen where its next batch is due.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import cycle, islice
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any

import cv2
import torch
from torch import multiprocessing  # registers how tensors travel: through shared memory

from utils.errors import UserError
from utils.stop import Stop
from utils.structures import Batch

log = logging.getLogger(__name__)

_AHEAD = 2  # requests that each worker has at a time
_MOST_DEATHS = 3  # in a row, without a batch in between
_PARENT_CHECK_S = 1.0  # how often an idle worker checks that its main process is alive

Make = Callable[[Any], Batch]


class Workers:
    """Run `make` in `count` processes, from the first request on until `stop` or the end of the program."""

    def __init__(self, make: Make, count: int) -> None:
        self._make = make
        self._count = count
        self._running: list[_Worker] = []
        self._iteration: object = None
        # Runs before multiprocessing's own exit handler, which waits for children that its SIGTERM does not end.
        self._finalize = Finalize(self, _end, args=[self._running], exitpriority=10)

    def batches(self, requests: Iterable[Any]) -> Generator[Batch, None, None]:
        """Yield `make(request)` for each request in order, even if workers die; one iteration at a time.

        Raises what `make` raises: a UserError as it is, anything else as a RuntimeError with its traceback; and a
        UserError if a worker dies repeatedly; OSError where too many files are open.
        """
        if self._iteration is not None:  # an earlier one was neither finished nor closed
            self.stop()
        this = self._iteration = object()
        if not self._running:
            self._running += [_Worker(self._make) for _ in range(self._count)]
        pending, turn, due = iter(requests), cycle(self._running), deque[_Worker]()
        try:
            for request, worker in zip(islice(pending, _AHEAD * self._count), turn, strict=False):
                worker.submit(request)
                due.append(worker)
            while due:
                assert self._iteration is this, "a newer iteration has taken the workers over"
                worker = due.popleft()
                batch = worker.result()
                for request in islice(pending, 1):
                    worker.submit(request)
                    due.append(worker)
                yield batch
            self._iteration = None
        finally:
            if self._iteration is this:  # left early: batches in progress are not those of the next requests
                self.stop()

    def stop(self) -> None:
        """End the processes; the next request starts new ones."""
        self._iteration = None
        _end(self._running)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._running if worker.process.pid is not None]


class _Worker:
    """One process, its pipe, and its requests without a result so far, oldest first."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._requests: deque[Any] = deque()
        self._start()

    def _start(self) -> None:
        """Start a process, and send it the requests without a result."""
        self._pipe, worker_end = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_work, args=(self._make, worker_end, os.getpid()), daemon=True)
        # Ctrl-C, a closing terminal, and a SIGTERM to a process group reach workers too. The main process handles them,
        # may need batches until then, and ends its workers by SIGKILL. A child inherits the blocked signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, set(Stop.SIGNALS))
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        worker_end.close()  # so that the pipe ends when the worker does
        for request in self._requests:
            self._send(request)

    def submit(self, request: Any) -> None:
        self._requests.append(request)
        self._send(request)

    def result(self) -> Batch:
        """Wait for the result of the oldest request, from a new process if this one has died."""
        deaths = 0
        while True:
            try:
                result = self._pipe.recv()
                break
            except (EOFError, OSError) as error:  # the end of the pipe, or of shared memory in transfer
                if isinstance(error, OSError) and error.errno == errno.EMFILE:
                    raise
                deaths += 1
                self.end()
                if deaths > _MOST_DEATHS:
                    raise UserError(
                        f"a worker that loads images died {deaths} times in a row ({self._cause()}): SIGKILL mostly "
                        "means too little memory, SIGBUS too little shared memory (docker's --shm-size); try fewer "
                        "--workers, or 0"
                    ) from error
                log.warning("a worker that loads images died (%s), another one replaces it", self._cause())
                self._start()
        self._requests.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def _send(self, request: Any) -> None:
        with suppress(OSError):  # it has died, which `result` handles
            self._pipe.send(request)

    def _cause(self) -> str:
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
    workers.clear()


def _work(make: Make, pipe: Connection, main: int) -> None:
    """Serve requests until the main process (`main` is its pid) ends.

    Forked workers inherit the main process's ends of earlier workers' pipes, so the end of a pipe does not reveal its
    death. They compare their parent with `main`, which may have died before this starts.
    """
    # Forked memory is shared until written to, and a garbage collection writes to all of it.
    gc.freeze()
    sys.excepthook = _but_for_lost_connections
    cv2.setNumThreads(0)  # the workers are the parallelism
    torch.set_num_threads(1)
    while multiprocessing.get_start_method() != "fork" or os.getppid() == main:
        try:
            if pipe.poll(_PARENT_CHECK_S):
                _reply(pipe, _result(make, pipe.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _but_for_lost_connections(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print an error, but not that of the thread that shares tensors when the main process is killed in between."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, where)


def _reply(pipe: Connection, result: Batch | Exception) -> None:
    """Send the result, or OSError where too many files are open to share its tensors."""
    try:
        pipe.send(result)
    except (OSError, RuntimeError) as error:  # torch raises the latter
        if os.strerror(errno.EMFILE) not in str(error):
            raise
        pipe.send(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))


def _result(make: Make, request: Any) -> Batch | Exception:
    try:
        return make(request)
    except UserError as error:
        return error
    except Exception:
        return RuntimeError(f"in a worker that loads images:\n{traceback.format_exc()}")
