"""Installed libraries and devices of this machine, and a record of both."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from utils.errors import UserError

_OPENCV_BUILDS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)


def check_torchvision() -> None:
    """Raise UserError if torchvision is absent or was built for another torch.

    The usual case is a CPU-only torch beside a torchvision built for CUDA, or the reverse: its compiled operators fail
    to load, and the import ends in "operator torchvision::nms does not exist".
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise UserError("torchvision is not installed: run `pip install torchvision`") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"torchvision {_version_of('torchvision')} does not load beside torch {torch.__version__} "
            f"({reason}): run `pip install --force-reinstall torch torchvision`, to get both from one source"
        ) from error


def check_opencv() -> None:
    """Warn if several OpenCV builds are installed: they overwrite each other in one `cv2` folder."""
    installed = [name for name in _OPENCV_BUILDS if _version_of(name) != "absent"]
    if len(installed) > 1:
        warnings.warn(
            f"{' and '.join(installed)} are installed side by side and overwrite each other's files: if cv2 "
            f"fails, run `pip uninstall {' '.join(installed)}`, then `pip install opencv-python-headless`",
            stacklevel=2,
        )


def pick_device(name: str) -> torch.device:
    """Return the device for 'auto' (CUDA, else Apple's MPS, else the CPU), 'cpu', 'cuda', 'cuda:1' or '1', 'mps'.

    Raises UserError for another name and for a device this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.isdecimal():
        name = f"cuda:{name}"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and not (kind == "cuda" and number.isdecimal())):
        raise UserError(f"device {name!r} is none of auto, cpu, cuda, cuda:0 (or 0), cuda:1 ..., mps")
    if kind == "cuda" and not torch.cuda.is_available():
        built = "cannot reach a GPU" if torch.version.cuda else "is a build without CUDA"
        raise UserError(f"device {name!r} is absent (torch {torch.__version__} {built}): choose cpu or auto")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is absent: the last one is cuda:{torch.cuda.device_count() - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name!r} is absent: choose cpu or auto")
    return torch.device(name)


def cuda_is_in_use() -> bool:
    """Return whether this process has used CUDA; asking must not initialize a GPU that a CPU training does not need."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def leave_a_core_to_loaders(device: torch.device, workers: int) -> None:
    """Compute with one thread fewer than cores if loader workers run beside a CPU training.

    OpenMP's threads wait for each other by spinning: with one per core, one more busy process slowed a training step
    on two cores from 0.29 s to 4 s; with one fewer it stayed at 0.36 s. OMP_NUM_THREADS takes precedence if set.
    """
    if device.type == "cpu" and workers > 0 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))


def describe(device: torch.device) -> dict[str, str]:
    """Return hardware and versions for a record of a measurement on `device`."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": _version_of("torchvision"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_name(),
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
    }


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cpu_name() -> str:
    with suppress(OSError):
        processors = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*:(.*)", processors, re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()
