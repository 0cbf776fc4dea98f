"""Free and used memory, and recognition of out-of-memory errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from utils.environment import cuda_is_in_use

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

# Of CUDA, MPS; the CPU; cuBLAS and cuDNN; OpenCV; numpy.
_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed", "insufficient memory", "unable to allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; not every library has an exception of its own for that."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in message for sign in _SIGNS)


def empty_cache() -> None:
    """Release the GPU's cached blocks, which do not serve requests of other sizes; a no-op without a GPU."""
    if cuda_is_in_use():
        torch.cuda.empty_cache()


def host_memory_like(tensor: Tensor) -> Tensor:
    """Return memory of the host for a copy; page-locked for a GPU's tensor, so that nothing waits for copying."""
    if tensor.device.type == "cuda":
        with suppress(RuntimeError):  # no more memory can be page-locked
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")


def peak_memory() -> str:
    """Return this process's peak in words: of tensors on a GPU, else of the whole process; "" on Windows."""
    if cuda_is_in_use() and (on_gpu := torch.cuda.max_memory_allocated()):
        return f", {on_gpu / 2**30:.2f} GiB of GPU memory so far"
    if resource is None:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", {peak / 2**30:.2f} GiB of memory so far"


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Return this rank's share of MemAvailable, or of what a container's limit leaves if that is less."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2]
    try:
        lines = (root / "proc" / "meminfo").read_text(encoding="utf-8").splitlines()
        free = [1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")] or free
    except (OSError, ValueError):
        pass  # not Linux
    return int(max(0, min([*free, *_left_by_cgroups(root)])) / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _left_by_cgroups(root: Path) -> Iterator[float]:
    """Yield what each limited control group (version 2) of this process leaves; inactive page cache counts as free."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for group in (top / line[3:].lstrip("/") for line in lines if line.startswith("0::")):
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            try:
                limit, taken = (
                    int((folder / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current")
                )
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
            except (OSError, ValueError):  # the root has no such files, and no limit is `max`
                continue
            yield limit - taken + int(stat.get("inactive_file", 0))
