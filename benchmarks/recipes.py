"""Which optimizer and learning rate train well: AP after a short training, over rates, mini-batches and seeds.

    python -m benchmarks.recipes --data PATH --cfg CFG --weights FILE [--epochs 12] [--optimizers sgd adamw]
        [--rates default 0.001 0.003] [--forwards 1 16] [--norms bn cmbn:carry] [--seeds 3]

A cell is one `train.py` with nothing else typed but the image size, and `evaluate.py` of its best.pt on the test split.
Rates are compared by AP on val, figures are those on test; the rate `default` is what train.py takes by itself. Rows go
to benchmarks/results/recipes.jsonl, a line per cell: a grid that was stopped goes on where it was. A training that ends
with exit code 3 has diverged and counts as AP 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measured import RESULTS, ROOT, Row, circumstances
from benchmarks.small_batch.rows import RowFile, read_rows
from utils.environment import pick_device
from utils.errors import exit_on_error


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One training. rate: "default", or a number. forwards: `--subdivisions`, so a mini-batch is batch / forwards.

    flags: more of train.py's, as typed.
    """

    data: str
    cfg: str
    weights: str
    image_size: int
    epochs: int
    optimizer: str
    rate: str
    forwards: int
    norm: str
    seed: int
    flags: str = ""

    @property
    def recipe(self) -> str:
        """The cell without its seed, as a line of the table."""
        rate = "" if self.rate == "default" else f" --learning-rate {self.rate}"
        cut = f"--epochs {self.epochs} --subdivisions {self.forwards}"
        return f"{cut} --norm {self.norm} --optimizer {self.optimizer}{rate} {self.flags}".rstrip()


def main() -> None:
    args = parse()
    path = RESULTS / "recipes.jsonl"
    if not args.report_only:
        with RowFile(path) as file:
            done = {name_of(row) for row in file.rows}
            for cell in cells(args):
                if name_of(asdict(cell)) not in done:
                    row = run(cell, args)
                    file.append(row)
                    print(
                        f"{cell.recipe} --seed {cell.seed}: test AP {row['test_AP']}, {row['seconds']:.0f} s",
                        flush=True,
                    )
    print(table(read_rows(path)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="with splits train, val and test")
    parser.add_argument("--cfg", default="yolov4-pico")
    parser.add_argument("--weights", default="", metavar="FILE", help="(default: from scratch)")
    parser.add_argument("--image-size", type=int, default=160, metavar="PX")
    parser.add_argument("--epochs", type=int, nargs="+", default=[12])
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"])
    parser.add_argument("--rates", nargs="+", default=["default"])
    parser.add_argument("--forwards", type=int, nargs="+", default=[1], help="mini-batches of a batch")
    parser.add_argument("--norms", nargs="+", default=["bn"])
    parser.add_argument("--flags", nargs="+", default=[""], help='more of train.py, such as "--amp off" "--amp auto"')
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", default="0", metavar="N")
    parser.add_argument("--report-only", action="store_true")
    return parser.parse_args()


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield the grid, seed by seed, so that a stopped one has the same seeds of all recipes."""
    fixed = {"data": args.data, "cfg": args.cfg, "weights": args.weights, "image_size": args.image_size}
    names = ("seed", "epochs", "forwards", "norm", "optimizer", "rate", "flags")
    swept = (range(args.seeds), args.epochs, args.forwards, args.norms, args.optimizers, args.rates, args.flags)
    for values in itertools.product(*swept):
        yield Cell(**fixed, **dict(zip(names, values, strict=True)))


def name_of(row: Row) -> tuple[object, ...]:
    """Return what tells cells apart; of paths the last part, so that a data set may move."""
    row = {"flags": "", **row}  # earlier rows had none
    return tuple(Path(row[name]).name if name in ("data", "cfg", "weights") else row[name] for name in Cell.__slots__)


def run(cell: Cell, args: argparse.Namespace) -> Row:
    """Train and test. Raises CalledProcessError if a page fails otherwise than by a diverged training."""
    flags = ["--data", cell.data, "--cfg", cell.cfg, "--image-size", str(cell.image_size), "--epochs", str(cell.epochs)]
    flags += ["--subdivisions", str(cell.forwards), "--norm", cell.norm, "--optimizer", cell.optimizer]
    flags += ["--seed", str(cell.seed), "--device", args.device, "--workers", args.workers]
    flags += [*(["--weights", cell.weights] if cell.weights else []), *cell.flags.split()]
    flags += [] if cell.rate == "default" else ["--learning-rate", cell.rate]
    row = {**asdict(cell), **{name: Path(getattr(cell, name)).name for name in ("data", "cfg", "weights")}}
    with tempfile.TemporaryDirectory() as scratch:
        folder, report, start = f"{scratch}/run", f"{scratch}/report", time.perf_counter()
        code = page("train.py", *flags, "--out", folder)
        row |= {"seconds": round(time.perf_counter() - start, 1), "diverged": code == 3}
        row |= dict.fromkeys(("val_AP", "test_AP", "test_AP50"), 0.0)
        if code == 0:
            row["val_AP"] = round(json.loads(Path(folder, "metrics.json").read_text())["AP"], 4)
            best = f"{folder}/best.pt"
            code = page("evaluate.py", "--weights", best, "--data", cell.data, "--split", "test", "--out", report)
            metrics = json.loads(Path(report, "metrics.json").read_text())
            row |= {"test_AP": round(metrics["AP"], 4), "test_AP50": round(metrics["AP50"], 4)}
    return {**row, **circumstances(pick_device(args.device))}


def page(name: str, *flags: str) -> int:
    """Run train.py or evaluate.py quietly. Returns 0, or 3 for a training that has diverged."""
    command = [sys.executable, str(ROOT / name), *flags]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_thread)
    if done.returncode not in (0, 3):
        print(done.stderr[-2000:], file=sys.stderr)
        done.check_returncode()
    return done.returncode


def table(rows: Sequence[Row]) -> str:
    """Return means over seeds, a line per data set, start and recipe."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        cell = Cell(**{name: row[name] for name in Cell.__slots__ if name in row})
        groups.setdefault(f"{cell.data}, {cell.weights or 'scratch'}: {cell.recipe}", []).append(row)
    width = max(map(len, groups), default=0)
    lines = [f"{'':{width}}  seeds  diverged  val AP  test AP  (lowest, highest)  AP50  seconds"]
    for name, group in groups.items():
        val, test, ap50, seconds = (
            [row[key] for row in group] for key in ("val_AP", "test_AP", "test_AP50", "seconds")
        )
        diverged = sum(row["diverged"] for row in group)
        spread = f"({100 * min(test):.1f}, {100 * max(test):.1f})"
        means = [100 * statistics.mean(values) for values in (val, test, ap50)]
        lines.append(
            f"{name:{width}}  {len(group):5}  {diverged:8}  {means[0]:6.1f}  {means[1]:7.1f}  {spread:17}  "
            f"{means[2]:4.1f}  {statistics.mean(seconds):7.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_on_error(main)
