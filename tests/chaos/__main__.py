"""python -m tests.chaos --folder DIR --events N: go on until N bad things have happened to trainings in DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.chaos.chaos import Chaos

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    typed = parser.parse_args()
    Chaos(typed.folder, seed=typed.seed).run(typed.events)
