"""Memory: how much was taken, and what it looks like when it is not enough."""

from __future__ import annotations

import sys

import torch

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
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory() -> str:
    """Of this process so far: on a GPU what tensors took there, elsewhere all of it; "" where nobody counts."""
    if torch.cuda.is_available() and (on_gpu := torch.cuda.max_memory_allocated()):
        return f", {on_gpu / 2**30:.2f} GiB of GPU memory so far"
    if resource is None:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", {peak / 2**30:.2f} GiB of memory so far"
