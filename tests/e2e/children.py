"""Trainings in child processes, for tests that kill them.

They are forked, because importing torch takes longer than they do, but from a server that has only imported: a fork of
pytest's own process takes over the locks that other tests' threads held at that moment, and may wait for them for good.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest  # noqa: F401  for the server: the tests whose functions it is handed import it
import torch
import torch._dynamo  # each optimizer imports it, which takes a child longer than its training
import torchvision  # noqa: F401  the same

import train
from cfg.parse import CfgError
from utils import fast_precision
from utils.checkpoint import Checkpoint
from utils.page import run_page

_PATIENCE_S = 240

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


def start(flags: Sequence[str], *, log: Path, before: Callable[[], object] | None = None) -> BaseProcess:
    """A child that runs `python train.py FLAGS`, its output going to `log`.

    before: what it does first; a function of a module, or a partial of one. A child that hangs ends with exit code 1,
    and the log shows where it was.
    """
    child = _forks.Process(target=_live, args=(flags, log, before))
    child.start()
    return child


def _live(flags: Sequence[str], log: Path, before: Callable[[], object] | None) -> None:
    os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    faulthandler.dump_traceback_later(_PATIENCE_S, exit=True)
    multiprocessing.set_start_method(None, force=True)  # or workers would come from a server, too: seconds
    torch.set_num_threads(1)
    fast_precision.cpu_bf16 = lambda: ""
    if before is not None:
        before()
    sys.argv = ["train.py", *flags]
    run_page(train.main, CfgError)


def ended(child: BaseProcess) -> int | None:
    """Wait for it; its exit code, or minus the signal that killed it."""
    child.join()
    return child.exitcode


def killed_after(child: BaseProcess, seconds: float) -> bool:
    """Kill it with SIGKILL once so long has passed; False where it had ended by itself, which must be well."""
    child.join(seconds)
    if child.exitcode is not None:
        assert child.exitcode == 0
        return False
    child.kill()
    return ended(child) == -signal.SIGKILL


def wait_for_step(run: Path, step: int, *, patience_s: float = 120) -> None:
    """Until last.pt was written after so many steps."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if (run / "last.pt").exists() and Checkpoint.from_file(run / "last.pt").step >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run}: no checkpoint of step {step} after {patience_s} s")


def assert_same_training(one: Path, other: Path) -> None:
    """To the bit: weights, averaged weights, optimizer, statistics, histories; and what results.csv says of losses."""
    a, b = (Checkpoint.from_file(run / "last.pt") for run in (one, other))
    assert a.step == b.step and a.best_ap == b.best_ap
    same(a.weights, b.weights, "weights")
    for part in ("network", "optimizer", "ranks"):
        same(a.training.state[part], b.training.state[part], part)
    same(Checkpoint.from_file(one / "best.pt").weights, Checkpoint.from_file(other / "best.pt").weights, "best")
    columns = [[row.split(",")[:-1] for row in (run / "results.csv").read_text().splitlines()] for run in (one, other)]
    assert columns[0] == columns[1]  # but for the seconds


def same(a: object, b: object, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            same(left, right, f"{where}.{index}")
    else:
        assert a == b, where
