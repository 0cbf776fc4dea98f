"""Common parts of the benchmarks: ratios of runs that take turns, and when and where they were measured."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.environment import describe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def against(base: Sequence[float], values: Sequence[float], name: str = "time_ratio") -> dict[str, Any]:
    """Return median and quartiles of the ratios by turn; what slows a whole turn down slows both."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    return {name: round(statistics.median(ratios), 3), f"{name}_quartiles": [round(low, 3), round(high, 3)]}


def wait_for(device: torch.device) -> None:
    """Wait until the GPU has done what it was told, so that a clock measures the work and not the telling."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def circumstances(device: torch.device, **more: Any) -> dict[str, Any]:
    """Return commit, date, versions and device, to be saved with the figures."""
    return {**more, "commit": commit(), "date": datetime.date.today().isoformat(), **describe(device)}


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def results_path(name: str, device: torch.device) -> Path:
    """Return a path per kind of GPU, so that its figures do not overwrite those of a CPU or another GPU."""
    if device.type == "cuda":
        name += "-" + torch.cuda.get_device_name(device).replace(" ", "-")
    return RESULTS / f"{name}.json"


def write(path: Path, found: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Write the figures as JSON and print the circumstances."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in measured.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**found, "measured": measured}, indent=1), encoding="utf-8")
