"""Time and score the main job: train, then evaluate on images that training never saw.

    python -m benchmarks.main_job [--data PATH] [--split test] [-- flags for train.py]

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

from benchmarks.measured import RESULTS, ROOT, circumstances
from utils.environment import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--split", default="test", help="split to score on (default test)")
    parser.add_argument("--out", help="folder to keep the run and the report in (default: a temporary one)")
    parser.add_argument("train_flags", nargs="*", help="after --: flags for train.py (default --norm cmbn)")
    args = parser.parse_args()
    flags = args.train_flags or ["--norm", "cmbn"]
    out = Path(args.out or tempfile.mkdtemp(prefix="main-job-"))
    run, report = out / "run", out / "report"
    start = time.perf_counter()
    page("train.py", "--data", args.data, "--out", str(run), *flags)
    minutes = (time.perf_counter() - start) / 60
    weights = str(run / "best.pt")
    page("evaluate.py", "--weights", weights, "--data", args.data, "--split", args.split, "--out", str(report))
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    steps = json.loads((run / "settings.json").read_text(encoding="utf-8"))["total_steps"]
    row = {
        "data": Path(args.data).name,
        "split": args.split,
        "flags": " ".join(flags),
        "AP": round(metrics["AP"], 3),
        "AP50": round(metrics["AP50"], 3),
        "training minutes": round(minutes, 1),
        "steps": steps,
        **circumstances(pick_device("auto")),
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "main_job.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    width = max(map(len, row))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in row.items()))


def page(name: str, *flags: str) -> None:
    """Run train.py or evaluate.py with these flags. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, str(ROOT / name), *flags], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
