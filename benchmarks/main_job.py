"""The main job, timed and scored: train, then evaluate on images that training never saw.

    python benchmarks/main_job.py [--data PATH] [--split test] [-- flags for train.py]

Prints the figures the README quotes and adds them to benchmarks/results/main_job.jsonl, with the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measured import RESULTS, circumstances  # noqa: E402
from utils.environment import pick_device  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--split", default="test", help="split to score on (default test)")
    parser.add_argument("--out", help="folder that keeps the run and the report (default: a temporary one)")
    parser.add_argument("train_flags", nargs="*", help="after --: flags for train.py (default --norm cmbn)")
    asked = parser.parse_args()
    flags = asked.train_flags or ["--norm", "cmbn"]
    out = Path(asked.out or tempfile.mkdtemp(prefix="main-job-"))
    run, report = out / "run", out / "report"
    begun = time.perf_counter()
    page("train.py", "--data", asked.data, "--out", str(run), *flags)
    minutes = (time.perf_counter() - begun) / 60
    weights = str(run / "best.pt")
    page("evaluate.py", "--weights", weights, "--data", asked.data, "--split", asked.split, "--out", str(report))
    metrics = json.loads((report / "metrics.json").read_text())
    steps = json.loads((run / "settings.json").read_text())["total_steps"]
    row = {
        "data": Path(asked.data).name,
        "split": asked.split,
        "flags": " ".join(flags),
        "AP": round(metrics["AP"], 3),
        "AP50": round(metrics["AP50"], 3),
        "training minutes": round(minutes, 1),
        "steps": steps,
        **circumstances(pick_device("auto")),
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "main_job.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    width = max(map(len, row))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in row.items()))


def page(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, str(ROOT / name), *flags], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
