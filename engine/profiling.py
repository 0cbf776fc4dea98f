"""Time and memory of a training step, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from engine.throughput import Throughput
from utils.console import line
from utils.structures import Batch

_SKIPPED, _WARM_UP, _TIMED = 2, 2, 8  # steps


def profiled(batches: Iterator[Batch], path: Path, *, say: Callable[[str], None]) -> Iterator[Batch]:
    """Yield the batches; after the first dozen, write the trace of their last steps to `path` and print a table.

    An epoch with fewer steps has a shorter trace; one with almost none prints a line only.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    timed = schedule(wait=_SKIPPED, warmup=_WARM_UP, active=_TIMED, repeat=1)
    pace = Throughput()
    with profile(activities=activities, schedule=timed, profile_memory=True) as profiler:
        for batch in pace.watch(islice(batches, _SKIPPED + _WARM_UP + _TIMED)):
            yield batch
            profiler.step()
    if pace.steps <= _SKIPPED + _WARM_UP:
        say(line("profile", f"needs more than {_SKIPPED + _WARM_UP} steps in an epoch"))
    else:
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        say(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=48))
        profiler.export_chrome_trace(str(path))
        say(line("profile", f"{path}, for chrome://tracing or ui.perfetto.dev; {pace}"))
    yield from batches
