"""Trainings in child processes, for tests that kill them: forked, because importing torch takes longer than they do.

On the CPU: CUDA does not survive a fork.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import train
from options import run_page
from utils.checkpoint import read_checkpoint


def start(flags: Sequence[str], *, log: Path, before: Callable[[], object] | None = None) -> int:
    """A child that runs `python train.py FLAGS`, its output going to `log` -> its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(out, stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
        if before is not None:
            before()
        sys.argv = ["train.py", *flags]
        try:
            run_page(train.main)
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for it; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(child: int, seconds: float) -> bool:
    """Kill it with SIGKILL once so long has passed; False where it had ended by itself, which must be well."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def wait_for_step(run: Path, step: int, *, patience_s: float = 120) -> None:
    """Until last.pt was written after so many steps."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if (run / "last.pt").exists() and read_checkpoint(run / "last.pt")["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run}: no checkpoint of step {step} after {patience_s} s")


def assert_same_training(one: Path, other: Path) -> None:
    """To the bit: weights, averaged weights, optimizer, statistics, histories; and what results.csv says of losses."""
    a, b = (read_checkpoint(run / "last.pt") for run in (one, other))
    assert a["step"] == b["step"] and a["best_ap"] == b["best_ap"]
    same(a["weights"], b["weights"], "weights")
    for part in ("network", "optimizer", "ranks"):
        same(a["training"][part], b["training"][part], part)
    same(read_checkpoint(one / "best.pt")["weights"], read_checkpoint(other / "best.pt")["weights"], "best")
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
