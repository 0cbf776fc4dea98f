"""Tests whose bodies run on two ranks at once, in two processes over gloo.

The body of a test marked `on_both_ranks` runs in each of two processes, started once for the whole file (that file run
as a program, which calls `run_as_rank`). Here a test passes when both said so, and otherwise shows the traceback of the
rank that did not. A file of such tests imports the fixture `verdicts`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from utils.seed import seed_everything

WORLD = 2
PATIENCE = timedelta(seconds=15)  # for the other rank, in one message
BODIES: dict[str, tuple[Callable[[int, str], None], tuple[str, ...]]] = {}


def on_both_ranks(*cases: str) -> Callable[[Callable[[int, str], None]], Callable[..., None]]:
    """Make a test of `body(rank, case)`, which both ranks run for each case."""

    def decorate(body: Callable[[int, str], None]) -> Callable[..., None]:
        BODIES[body.__name__] = body, cases

        @pytest.mark.parametrize("case", cases)
        def verdict(case: str, verdicts: list[dict[str, str]]) -> None:
            found = [said.get(f"{body.__name__}[{case}]", said["end"]) for said in verdicts]
            problems = [f"rank {rank}:\n{problem}" for rank, problem in enumerate(found) if problem]
            if problems:
                pytest.fail("\n".join(problems), pytrace=False)

        return verdict

    return decorate


def run_as_rank(rank: int, folder: Path) -> None:
    """Every body for every case; what went wrong goes to `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    store.set_timeout(3 * PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=PATIENCE)
    verdicts = {}
    for body, case in ((body, case) for body, cases in BODIES.values() for case in cases):
        name = f"{body.__name__}[{case}]"
        verdicts[name], in_step = verdict_of(body, rank, case)
        (folder / f"{rank}.json").write_text(json.dumps(verdicts))
        # Not by a message: a rank that failed may have left the other alone in one, and what comes next would answer.
        store.set(f"{name} {rank}", "in step" if in_step else "lost")
        if any(store.get(f"{name} {each}") == b"lost" for each in range(WORLD)):
            return


def verdict_of(body: Callable[[int, str], None], rank: int, case: str) -> tuple[str, bool]:
    """Empty or the traceback, and whether no message was left without an answer."""
    seed_everything(0)
    try:
        body(rank, case)
    except Exception as error:
        return traceback.format_exc(), not isinstance(error, RuntimeError)  # what a message raises after PATIENCE
    return "", True


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank: what went wrong in each body, and under `end` what is to be said of those it did not reach."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch was built without torch.distributed and gloo")
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    said = [(folder / f"{rank}.txt").open("w+") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(request.path), str(rank), str(folder)],
            cwd=root,
            env=environment,
            stdout=out,
            stderr=out,
        )
        for rank, out in enumerate(said)
    ]
    try:
        wait_for(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [read_verdicts(folder / f"{rank}.json", out) for rank, out in enumerate(said)]


def wait_for(processes: list[subprocess.Popen], *, at_most_seconds: float = 540) -> None:
    """Until all are done, or one has died: the other would wait for it in vain."""
    end = time.monotonic() + at_most_seconds
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            return
        time.sleep(0.05)


def read_verdicts(path: Path, said: TextIO) -> dict[str, str]:
    with said:
        said.seek(0)
        printed = said.read()
    verdicts = json.loads(path.read_text()) if path.exists() else {}
    last = next(reversed(verdicts), "nothing")
    return {**verdicts, "end": f"not reached; the process ended after {last} and printed\n{printed}"}


def of_ranks(own: Tensor) -> list[Tensor]:
    """Each rank's tensor of this name."""
    everyone = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(everyone, own.contiguous())
    return everyone
