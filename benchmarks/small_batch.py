"""The small-batch study: what a norm is worth in COCO AP when a forward sees 1, 2, 4, 8 or 16 images.

    python benchmarks/small_batch.py --budget quick
    python benchmarks/small_batch.py --budget standard --bccd PATH [--time-limit MINUTES]

Protocol. A cell is one training through train.py's own functions: a data set, a norm recipe, a mini-batch, a seed, a
learning rate, with or without mosaic, a network. Every cell takes as many optimizer steps on batches of 16 images,
cut into 16 / mini-batch mini-batches, so all see equally many images. A seed fixes the initial weights, the order
of images and their augmentation, for every recipe and every mini-batch alike: cells are paired by seed. The best of
4 evaluations on the val split gives the weights, and these are measured once on the test split, which neither training
nor selection ever reads. The learning rate is tuned for each recipe and mini-batch by AP on val, with the same rates
and one seed for all, which is no test seed; such cells are not tested at all. A cell whose loss stops being finite
scores 0.

Statistics. Mean over seeds with an expanded percentile bootstrap interval; differences to BN at the same mini-batch
are paired by seed, and tested one-sided with all 2^n sign flips. One-sided, because the question is who gains on BN,
and because two-sided p cannot fall below .0625 with 5 seeds; a table of k recipes needs more seeds yet (8 for up to
12) to hold together after Holm's correction, which is marked apart. Recipes with centralized weights are compared with
BN that has them too. Data are fixed: intervals are over seeds, not over data sets.

Budgets: smoke (a minute, proves that it runs), quick (minutes on 2 cores, rates not tuned), standard (hours on a CPU),
full (a GPU; `yolov4-tiny` and a yolov4 of half the width at 416 px). Rows go to benchmarks/results/small_batch/, a line
a cell as it is done: a grid that was stopped goes on where it was, and more seeds or recipes add to it. Rates are tuned
on each data set without mosaic; standard takes those of mini-batch 1 for 2 and 4. `frozen` is left out: trained from
scratch it has no statistics.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.small_batch.cell import code_version, run_cell  # noqa: E402
from benchmarks.small_batch.grid import BUDGETS, TUNE_SEED, Cell, Grid, left  # noqa: E402
from benchmarks.small_batch.plots import plot_gaps, plot_images, plot_mini_batches  # noqa: E402
from benchmarks.small_batch.processes import run_cells  # noqa: E402
from benchmarks.small_batch.progress import Progress  # noqa: E402
from benchmarks.small_batch.recipes import options_of, with_references  # noqa: E402
from benchmarks.small_batch.report import Results, Row, json_report, leading, markdown_report, text_report  # noqa: E402
from benchmarks.small_batch.rows import RowFile, read_rows  # noqa: E402
from benchmarks.small_batch.sources import DATA, NETS, prepare  # noqa: E402
from utils.environment import describe, pick_device  # noqa: E402
from utils.errors import UserError, exit_on_error  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "small_batch"
RECIPES_HELP = "such as cmbn-weights (a name that is none prints them all), and the BN they are compared with"
SEEDS_HELP = "1 to N, or N-M, and a table of these alone (default: the budget's, and a table of all that there are)"
_JOB_GIB = {"small": 2, "tiny": 5, "half": 10}  # of GPU memory that a process may want


def main(argv: Sequence[str] | None = None) -> None:
    asked = parse(argv)
    grid = chosen_grid(asked)
    path = Path(asked.out) / f"{asked.budget}.jsonl"
    failed = 0
    if asked.report_only:
        rows = read_rows(path)
    else:
        with RowFile(path) as file:
            failed = run_grid(grid, file, asked)
            rows = file.rows
    if asked.seeds:
        if not asked.report_only:
            report(grid, rows, path)
        rows = [row for row in rows if row["role"] == "tune" or row["seed"] in asked.seeds]
        path = path.with_stem(f"{path.stem}-seeds-{asked.seeds[0]}-{asked.seeds[-1]}")
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
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="start no cell after that")
    parser.add_argument("--report-only", action="store_true", help="table and plots of the rows there are")
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR", help="(default benchmarks/results/small_batch)")
    return parser.parse_args(argv)


def seeds(text: str) -> range:
    """`10`: from 1 to 10; `6-10`: those that a recipe found by looking at the first five has not seen yet."""
    first, dash, last = text.partition("-")
    found = range(int(first), int(last) + 1) if dash else range(TUNE_SEED + 1, int(first) + 1)
    if not found or TUNE_SEED in found:
        raise ValueError(text)
    return found


def chosen_grid(asked: argparse.Namespace) -> Grid:
    """The budget's, restricted to what was asked for. UserError for what is no recipe."""
    grid = BUDGETS[asked.budget]
    recipes = with_references(tuple(asked.only)) if asked.only else grid.recipes
    for recipe in recipes:
        options_of(recipe, steps=grid.steps)
    data = tuple(asked.data or grid.data)
    for name, folder in (("bccd", asked.bccd), ("coco-tiny", asked.coco)):
        if name in data and folder is None and not asked.report_only:
            print(f"{name} is left out: give its folder with --{name.partition('-')[0]}")
            data = tuple(each for each in data if each != name)
    return replace(
        grid,
        recipes=recipes,
        data=data,
        nets=tuple(asked.net or grid.nets),
        mini_batches=tuple(asked.minibatches or grid.mini_batches),
        mosaics=tuple(value == "on" for value in asked.mosaic) if asked.mosaic else grid.mosaics,
        seeds=asked.seeds or grid.seeds,
    )


def run_grid(grid: Grid, file: RowFile, asked: argparse.Namespace) -> int:
    """Tuning, then the main cells whose rates are known -> how many failed."""
    check_device(file.rows, asked.device)
    deadline = time.monotonic() + 60 * asked.time_limit if asked.time_limit else float("inf")
    failed = run_missing("tuning", grid.tune_cells(), file, asked, deadline)
    failed += run_missing("main", grid.main_cells(file.rows), file, asked, deadline)
    if untuned := len(list(left(grid.tune_cells(), file.rows))):
        print(f"{untuned} tuning cells are left: recipes that they belong to wait for them")
    return failed


def check_device(rows: Sequence[Row], device: str) -> None:
    """UserError where rows are of another kind of device: rates would be tuned, and seeds paired, across them."""
    wanted = describe(pick_device(device))["device"]
    for row in rows:
        if row["machine"]["device"] != wanted:
            found = row["machine"]["device"]
            raise UserError(f"the rows there are were made on {found}, this is {wanted}: name another folder by --out")


def run_missing(what: str, cells: Sequence[Cell], file: RowFile, asked: argparse.Namespace, deadline: float) -> int:
    """Those cells that have no row yet -> how many failed."""
    waiting = list(left(cells, file.rows))
    if not waiting or time.monotonic() > deadline:
        return 0
    folders = {name: folder for name, folder in (("bccd", asked.bccd), ("coco-tiny", asked.coco)) if folder}
    for cell in {(cell.data, cell.net): cell for cell in waiting}.values():
        prepare(cell, folders)  # here, because processes side by side would all make the digits
    jobs = asked.jobs if asked.jobs is not None else default_jobs(asked.device, {cell.net for cell in waiting})
    progress = Progress(waiting, file.rows, jobs=jobs)
    print(f"{what}: {len(waiting)} of {len(cells)} cells to do, {jobs} at a time, about {progress.remaining()} h")
    work = partial(run_cell, folders=folders, device=asked.device, workers=asked.workers, commit=code_version())
    failed = 0
    for outcome in run_cells(waiting, work, jobs=jobs, deadline=deadline):
        if outcome.row is None:
            failed += 1
            print(outcome.said, file=sys.stderr)
        else:
            file.append({**outcome.row, "jobs": jobs})
        print(progress.done(outcome.cell, outcome.row), flush=True)
    return failed


def default_jobs(device: str, nets: Iterable[str]) -> int:
    """As many as cores: a cell keeps one busy, on a GPU too. There its memory may be the tighter limit."""
    cores, chosen = os.cpu_count() or 1, pick_device(device)
    if chosen.type != "cuda":
        return cores
    gib = torch.cuda.get_device_properties(chosen).total_memory / 2**30
    return max(1, min(cores, int(gib / max(_JOB_GIB[net] for net in nets))))


def report(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """Print the table; write it, the figures behind it and the plots beside the rows."""
    results = Results(rows, grid)
    lines = results.lines()
    if not lines:
        print("no cell is tested yet, so there is no table")
        return
    shown = leading(lines)
    plots = {
        "mini-batches": partial(plot_mini_batches, [line for line in lines if line.recipe in shown]),
        "images": partial(plot_images, results, shown),
        "gaps": partial(plot_gaps, results, shown),
    }
    images = {name: path.with_name(f"{path.stem}-{name}.png") for name in plots}
    for name, plot in plots.items():
        plot(images[name])
    title = f"Small-batch study, budget {path.stem}"
    names = [image.name for image in images.values()]
    path.with_suffix(".md").write_text(markdown_report(lines, rows, steps=grid.steps, title=title, images=names))
    path.with_suffix(".json").write_text(json_report(lines))
    print(f"\n{text_report(lines, rows, steps=grid.steps)}\n\nrows, table and plots: {path.with_suffix('.*')}")


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Through the finally clauses, which end the cells at work."""
    raise SystemExit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    exit_on_error(main)
