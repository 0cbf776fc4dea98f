"""The small-batch study: what a norm is worth in COCO AP when a forward sees 1, 2, 4, 8 or 16 images.

    python -m benchmarks.small_batch --budget quick
    python -m benchmarks.small_batch --budget standard --bccd PATH [--time-limit MINUTES]

Protocol. A cell is one training by train.py's own functions: a data set, a recipe (what is typed after --norm), a
mini-batch, a seed, a learning rate, with or without mosaic, a network. Every cell takes the same number of optimizer
steps on batches of 16 images, cut into 16 / mini-batch mini-batches, so all see equally many images. A seed fixes the
initial weights, the order of images and their augmentation, for every recipe and every mini-batch: cells are paired by
seed. The best of 4 evaluations on the val split gives the weights, and these are measured once on the test split, which
neither training nor selection ever reads. The learning rate is tuned for each recipe and mini-batch by AP on val, with
the same rates and the same seed for all, which is not a test seed; tuning cells are not tested. A cell with a loss that
becomes NaN or Inf scores 0. Burn-ins take a tenth of the training.

Statistics. Mean over seeds with an expanded percentile bootstrap interval; differences to BN at the same mini-batch
are paired by seed, and tested one-sided with all 2^n sign flips. One-sided, because the question is which recipe is
better than BN, and because two-sided p cannot fall below .0625 with 5 seeds; a table of k recipes needs more seeds (8
for up to 12) to be significant after Holm's correction, which has a mark of its own. Recipes with centralized weights
are compared with BN that has them too. Data are fixed: intervals are over seeds, not over data sets.

Budgets: smoke (a minute, proves that it runs), quick (minutes on 2 cores, rates not tuned), standard (hours on a CPU),
full (a GPU; `yolov4-tiny` and a yolov4 of half the width at 416 px). Rows go to benchmarks/results/small_batch/, one
line per finished cell: a grid that was stopped goes on where it was, and more seeds or recipes add to it. Rates are
tuned on each data set without mosaic; standard takes those of mini-batch 1 for 2 and 4. `frozen` is no recipe: trained
from scratch it has no statistics.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from benchmarks.small_batch.cell import code_version, run_cell
from benchmarks.small_batch.grid import BUDGETS, TUNE_SEED, Cell, Grid, left
from benchmarks.small_batch.plots import plot_gaps, plot_images, plot_mini_batches, styles_of
from benchmarks.small_batch.processes import run_cells
from benchmarks.small_batch.progress import Progress
from benchmarks.small_batch.recipes import canonical, with_references
from benchmarks.small_batch.report import Results, Row, json_report, leading, markdown_report, text_report
from benchmarks.small_batch.rows import RowFile, read_rows
from benchmarks.small_batch.sources import DATA, NETS, prepare
from utils.environment import describe, pick_device
from utils.errors import UserError, exit_on_error

RESULTS = Path(__file__).resolve().parent.parent / "results" / "small_batch"
RECIPES_HELP = "what is typed after --norm, each in quotes: 'cbn:window=8' 'mabn --precise-bn 512'; BN is added"
SEEDS_HELP = "1 to N, or N-M, and a table of these alone (default: the budget's, and a table of all rows)"
_JOB_GIB = {"small": 2, "tiny": 5, "half": 10}  # GPU memory that one process may need


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    grid = chosen_grid(args)
    path = Path(args.out) / f"{args.budget}.jsonl"
    failed = 0
    if args.report_only:
        rows = read_rows(path)
    else:
        with RowFile(path) as file:
            failed = run_grid(grid, file, args)
            rows = file.rows
    if args.seeds:
        if not args.report_only:
            report(grid, rows, path)
        rows = [row for row in rows if row["role"] == "tune" or row["seed"] in args.seeds]
        path = path.with_stem(f"{path.stem}-seeds-{args.seeds[0]}-{args.seeds[-1]}")
    report(grid, rows, path)
    if failed:
        raise SystemExit(f"{failed} cells failed; the same command tries them again")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="quick")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help=RECIPES_HELP)
    parser.add_argument("--data", nargs="+", choices=DATA, help="data sets (default: the budget's)")
    parser.add_argument("--net", nargs="+", choices=NETS, help="networks (default: the budget's)")
    parser.add_argument("--minibatches", nargs="+", type=int, choices=(1, 2, 4, 8, 16), help="(default: the budget's)")
    parser.add_argument("--mosaic", nargs="+", choices=("off", "on"), help="(default: the budget's)")
    parser.add_argument("--seeds", type=seeds, metavar="N", help=SEEDS_HELP)
    parser.add_argument("--bccd", metavar="PATH", help="folder of BCCD (VOC, with its train, val and test splits)")
    parser.add_argument("--coco", metavar="PATH", help="folder of coco_tiny, for --data coco-tiny: trained, not tested")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes side by side (default: as many as cores)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes of each (default 0)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="start no cell after this time")
    parser.add_argument(
        "--report-only", action="store_true", help="print the table and draw the plots of the existing rows"
    )
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR", help="(default benchmarks/results/small_batch)")
    return parser.parse_args(argv)


def seeds(text: str) -> range:
    """Read `10`, seeds 1 to 10, or `6-10`, such as those not used when a recipe was chosen. Raises ValueError."""
    first, dash, last = text.partition("-")
    found = range(int(first), int(last) + 1) if dash else range(TUNE_SEED + 1, int(first) + 1)
    if not found or TUNE_SEED in found:
        raise ValueError(text)
    return found


def chosen_grid(args: argparse.Namespace) -> Grid:
    """Return the budget's grid, with what the command line chooses. Raises UserError for what is no recipe."""
    grid = BUDGETS[args.budget]
    recipes = with_references(tuple(map(canonical, args.only))) if args.only else grid.recipes
    data = tuple(args.data or grid.data)
    for name, folder in (("bccd", args.bccd), ("coco-tiny", args.coco)):
        if name in data and folder is None and not args.report_only:
            print(f"{name} is left out: give its folder with --{name.partition('-')[0]}")
            data = tuple(other for other in data if other != name)
    return replace(
        grid,
        recipes=recipes,
        data=data,
        nets=tuple(args.net or grid.nets),
        mini_batches=tuple(args.minibatches or grid.mini_batches),
        mosaics=tuple(value == "on" for value in args.mosaic) if args.mosaic else grid.mosaics,
        seeds=args.seeds or grid.seeds,
    )


def run_grid(grid: Grid, file: RowFile, args: argparse.Namespace) -> int:
    """Run the tuning, then the main cells with known rates. Returns how many failed."""
    check_device(file.rows, args.device)
    deadline = time.monotonic() + 60 * args.time_limit if args.time_limit else float("inf")
    failed = run_missing("tuning", grid.tune_cells(), file, args, deadline)
    failed += run_missing("main", grid.main_cells(file.rows), file, args, deadline)
    if untuned := len(list(left(grid.tune_cells(), file.rows))):
        print(f"{untuned} tuning cells are left: their recipes wait for them")
    return failed


def check_device(rows: Sequence[Row], device: str) -> None:
    """Raise UserError if rows come from another kind of device: seeds would be paired, and rates tuned, across them."""
    current = describe(pick_device(device))["device"]
    for row in rows:
        if row["machine"]["device"] != current:
            found = row["machine"]["device"]
            raise UserError(
                f"the existing rows were made on {found}, this is {current}: choose another folder by --out"
            )


def run_missing(what: str, cells: Sequence[Cell], file: RowFile, args: argparse.Namespace, deadline: float) -> int:
    """Run the cells that have no row yet. Returns how many failed."""
    waiting = list(left(cells, file.rows))
    if not waiting or time.monotonic() > deadline:
        return 0
    folders = {name: folder for name, folder in (("bccd", args.bccd), ("coco-tiny", args.coco)) if folder}
    for cell in {(cell.data, cell.net): cell for cell in waiting}.values():
        prepare(cell, folders)  # once, before processes side by side would all make the digits
    jobs = args.jobs if args.jobs is not None else default_jobs(args.device, {cell.net for cell in waiting})
    progress = Progress(waiting, file.rows, jobs=jobs)
    print(f"{what}: {len(waiting)} of {len(cells)} cells to do, {jobs} at a time, about {progress.remaining()} h")
    work = partial(run_cell, folders=folders, device=args.device, workers=args.workers, commit=code_version())
    failed = 0
    for outcome in run_cells(waiting, work, jobs=jobs, deadline=deadline):
        if outcome.row is None:
            failed += 1
            print(outcome.log_tail, file=sys.stderr)
        else:
            file.append({**outcome.row, "jobs": jobs})
        print(progress.done(outcome.cell, outcome.row), flush=True)
    return failed


def default_jobs(device: str, nets: Iterable[str]) -> int:
    """Return the number of cores, because a cell keeps one busy; on a GPU fewer if its memory is too small for that."""
    cores, chosen = os.cpu_count() or 1, pick_device(device)
    if chosen.type != "cuda":
        return cores
    gib = torch.cuda.get_device_properties(chosen).total_memory / 2**30
    return max(1, min(cores, int(gib / max(_JOB_GIB[net] for net in nets))))


def report(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """Print the table; write it, the plots and their figures beside the rows."""
    results = Results(rows, grid)
    lines = results.lines()
    if not lines:
        print("no cell has a test result yet, so there is no table")
        return
    shown = leading(lines)
    styles = styles_of(line.recipe for line in lines if line.recipe in shown)
    plots = {
        "mini-batches": partial(plot_mini_batches, lines, styles),
        "images": partial(plot_images, results, styles),
        "gaps": partial(plot_gaps, results, styles),
    }
    images = {name: path.with_name(f"{path.stem}-{name}.png") for name in plots}
    for name, plot in plots.items():
        plot(images[name])
    title = f"Small-batch study, budget {path.stem}"
    names = [image.name for image in images.values()]
    path.with_suffix(".md").write_text(markdown_report(lines, rows, title=title, images=names))
    path.with_suffix(".json").write_text(json_report(lines))
    print(f"\n{text_report(lines, rows)}\n\nrows, table and plots: {path.with_suffix('.*')}")


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Leave through the finally clauses, which end the running cells."""
    raise SystemExit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    exit_on_error(main)
