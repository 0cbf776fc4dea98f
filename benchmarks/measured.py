"""What the benchmarks' answers share: ratios of runs that took turns, and where and when they were measured."""

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


def against(base: Sequence[float], values: Sequence[float], name: str = "time_ratio") -> dict[str, Any]:
    """Median and quartiles of the turns' ratios: what slows a whole turn down is in both."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    return {name: round(statistics.median(ratios), 3), f"{name}_quartiles": [round(low, 3), round(high, 3)]}


def circumstances(device: torch.device, **more: Any) -> dict[str, Any]:
    return {**more, "commit": commit(), "date": datetime.date.today().isoformat(), **describe(device)}


def commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def results_path(name: str, device: torch.device) -> Path:
    """A GPU's figures do not overwrite the CPU's, nor another GPU's."""
    if device.type == "cuda":
        name += "-" + torch.cuda.get_device_name(device).replace(" ", "-")
    return RESULTS / f"{name}.json"


def write(path: Path, found: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """As json, and the circumstances to the screen."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in measured.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**found, "measured": measured}, indent=1))
