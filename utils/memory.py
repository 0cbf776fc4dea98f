"""Memory: how much there is, how much was taken, and what it looks like when it is not enough."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from utils.environment import cuda_is_in_use

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed")  # of CUDA, MPS; the CPU; cuBLAS and cuDNN


def is_out_of_memory(error: BaseException) -> bool:
    """Whichever library says so: not all of them have an error of its own for that."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in _SIGNS)


def empty_cache() -> None:
    """Of the GPU, where there is one: what is cached in large pieces does not help small ones."""
    if cuda_is_in_use():
        torch.cuda.empty_cache()


def peak_memory() -> str:
    """Of this process so far: on a GPU what tensors took there, elsewhere all of it; "" where nobody counts."""
    if cuda_is_in_use() and (on_gpu := torch.cuda.max_memory_allocated()):
        return f", {on_gpu / 2**30:.2f} GiB of GPU memory so far"
    if resource is None:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", {peak / 2**30:.2f} GiB of memory so far"


def free_memory_bytes(root: Path = Path("/")) -> int:
    """What Linux calls available, or what a control group leaves if that is less; shared out over ranks."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2]
    try:
        lines = (root / "proc" / "meminfo").read_text().splitlines()
        free = [1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")] or free
    except (OSError, ValueError):
        pass  # another system
    return int(max(0, min([*free, *_left_by_groups(root)])) / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _left_by_groups(root: Path) -> Iterator[float]:
    """By each control group with a limit that this process is in: of version 2, or version 1's of memory.

    What it could give back at once, the pages of files that nobody reads, does not count as taken.
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in groups:
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        own = top / path.lstrip("/")
        for group in (own, *(above for above in own.parents if above.is_relative_to(top))):
            try:
                limit, taken = int((group / names[0]).read_text()), int((group / names[1]).read_text())
                pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # none, or no limit, which is `max`
                continue
            yield limit - taken + int(pages.get(names[2], 0))
