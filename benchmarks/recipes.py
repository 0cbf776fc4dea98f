"""Which optimizer and learning rate train well: AP after a short training, over rates, mini-batches and seeds.

    python -m benchmarks.recipes --data PATH [--cfg CFG] [--weights FILE] [--epochs 12] [--optimizers auto sgd]
        [--rates default 0.001 0.01] [--forwards default 16] [--norms bn cmbn:carry] [--seeds 3]

A cell is one `train.py` with nothing else typed but the image size, and `evaluate.py` of its best.pt on the test split
(on val if there is none). Rates are compared by AP on val, figures are those on test; `default` is what train.py takes
by itself. Rows go to benchmarks/results/recipes.jsonl, a line per cell: a grid that was stopped goes on where it was. A
training that ends with exit code 3 has diverged and counts as AP 0.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.measured import RESULTS, ROOT, Row, circumstances
from data.annotation_formats import open_image_set
from study.rows import RowFile, read_rows
from utils.environment import pick_device
from utils.errors import UserError, exit_on_error


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One training.

    rate: "default", or a number. forwards: "default", or `--subdivisions`, so a mini-batch is batch / forwards.
    flags: more of train.py's, as typed.
    """

    data: str
    cfg: str
    weights: str
    image_size: int
    epochs: int
    optimizer: str
    rate: str
    forwards: str
    norm: str
    seed: int
    flags: str = ""

    @property
    def recipe(self) -> str:
        """The cell without its seed, as a line of the table."""
        rate = "" if self.rate == "default" else f" --learning-rate {self.rate}"
        return f"{self.trained} --norm {self.norm} --optimizer {self.optimizer}{rate} {self.flags}".rstrip()

    @property
    def trained(self) -> str:
        """The length and the cut, as typed."""
        return f"--epochs {self.epochs}" + ("" if self.forwards == "default" else f" --subdivisions {self.forwards}")


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
    rows = read_rows(path)
    print(table(rows), basins(rows), sep="\n\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="with splits train, val and test")
    parser.add_argument("--cfg", default="yolov4-pico")
    parser.add_argument("--weights", default="", metavar="FILE", help="(default: from scratch)")
    parser.add_argument("--image-size", type=int, default=160, metavar="PX")
    parser.add_argument("--epochs", type=int, nargs="+", default=[12])
    parser.add_argument("--optimizers", nargs="+", default=["auto", "sgd"])
    parser.add_argument("--rates", nargs="+", default=["default"])
    parser.add_argument("--forwards", nargs="+", default=["default"], help="mini-batches of a batch")
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
    flags += ["--norm", *cell.norm.split(), "--optimizer", cell.optimizer]  # also "bn --norm-eval"
    flags += ["--seed", str(cell.seed), "--device", args.device, "--workers", args.workers]
    flags += ["--weights", cell.weights] if cell.weights else []
    flags += cell.flags.split()
    flags += [] if cell.forwards == "default" else ["--subdivisions", cell.forwards]
    flags += [] if cell.rate == "default" else ["--learning-rate", cell.rate]
    row = {**asdict(cell), **{name: Path(getattr(cell, name)).name for name in ("data", "cfg", "weights")}}
    with tempfile.TemporaryDirectory() as scratch:
        folder, report, start = f"{scratch}/run", f"{scratch}/report", time.perf_counter()
        code = page("train.py", *flags, "--out", folder)
        row |= {"seconds": round(time.perf_counter() - start, 1), "diverged": code == 3}
        row |= dict.fromkeys(("val_AP", "test_AP", "test_AP50"), 0.0)
        settings = json.loads(Path(folder, "settings.json").read_text(encoding="utf-8"))
        row |= {name: settings[name] for name in ("batch_size", "subdivisions", "learning_rate", "total_steps")}
        if code == 0:
            metrics = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
            row["val_AP"] = round(metrics["AP"], 4)
            if has_test_split(cell.data):
                best = f"{folder}/best.pt"
                page("evaluate.py", "--weights", best, "--data", cell.data, "--split", "test", "--out", report)
                metrics = json.loads(Path(report, "metrics.json").read_text(encoding="utf-8"))
            row |= {"test_AP": round(metrics["AP"], 4), "test_AP50": round(metrics["AP50"], 4)}
    return {**row, **circumstances(pick_device(args.device))}


def has_test_split(data: str) -> bool:
    """Return whether `evaluate.py --split test` finds images."""
    try:
        return len(open_image_set(data, "test")) > 0
    except UserError:
        return False


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
    groups = grouped(rows, lambda cell: f"{start_of(cell)}: {cell.recipe}")
    width = max(map(len, groups), default=0)
    lines = [f"{'':{width}}  seeds  diverged  val AP  test AP  (lowest, highest)  AP50  seconds"]
    for name, group in groups.items():
        test = [row["test_AP"] for row in group]
        spread = f"({100 * min(test):.1f}, {100 * max(test):.1f})"
        val_ap, test_ap, ap50 = (100 * mean(group, key) for key in ("val_AP", "test_AP", "test_AP50"))
        lines.append(
            f"{name:{width}}  {len(group):5}  {sum(row['diverged'] for row in group):8}  {val_ap:6.1f}  "
            f"{test_ap:7.1f}  {spread:17}  {ap50:4.1f}  {mean(group, 'seconds'):7.0f}"
        )
    return "\n".join(lines)


def basins(rows: Sequence[Row]) -> str:
    """Return how much the learning rate matters: a line per recipe of which several rates were tried.

    Means over the seeds that all its rates have. The share of rates within 10 % of the best AP on val, and the AP on
    test at each rate over that at the best.
    """
    lines = []
    typed = [row for row in rows if row["rate"] != "auto"]
    for name, group in grouped(typed, lambda cell: f"{start_of(cell)}: {replace(cell, rate='default').recipe}").items():
        by_rate: dict[float, dict[int, Row]] = {}
        for row in group:
            by_rate.setdefault(row["learning_rate"], {})[row["seed"]] = row
        seeds = set.intersection(*(set(by_seed) for by_seed in by_rate.values()))
        if len(by_rate) < 3 or not seeds:
            continue
        cells = {rate: [by_seed[seed] for seed in seeds] for rate, by_seed in sorted(by_rate.items())}
        best = max(cells, key=lambda rate: mean(cells[rate], "val_AP"))
        near = sum(mean(tried, "val_AP") >= 0.9 * mean(cells[best], "val_AP") for tried in cells.values())
        shares = {rate: mean(tried, "test_AP") / (mean(cells[best], "test_AP") or 1) for rate, tried in cells.items()}
        each = ", ".join(f"{rate:g}: {share:.2f}" for rate, share in shares.items())
        lines.append(f"{name}: {near} of {len(cells)} rates within 10 % of the best, {best:g}; {each}")
    return "\n".join(lines)


def grouped(rows: Sequence[Row], key: Callable[[Cell], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(Cell(**{name: row[name] for name in Cell.__slots__ if name in row})), []).append(row)
    return groups


def start_of(cell: Cell) -> str:
    return f"{cell.data}, {cell.weights or 'scratch'}"


def mean(rows: Sequence[Row], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


if __name__ == "__main__":
    exit_on_error(main)
