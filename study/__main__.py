"""python -m study

Which norm on my data: train with each norm, at each number of images in a forward, with several seeds, and compare AP
on images that no training has seen. Every training takes equally many steps on batches of the same size, cut into
forwards; a seed fixes initial weights, order of images and augmentation, for all norms. docs/study.md has more.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from cfg.parse import CfgError
from study.cell import Source, code_version, run_cell
from study.grid import TUNE_SEED, Cell, Grid, Row, left
from study.own import OwnStudy, own_source, own_study
from study.plot import plot
from study.presets import PRESETS, RESULTS, preset_source
from study.processes import run_cells
from study.progress import Progress
from study.recipes import canonical, with_references
from study.report import Line, Results, advice, json_report, report
from study.rows import RowFile, read_rows
from utils.console import say, warn
from utils.environment import pick_device
from utils.errors import UserError
from utils.flags import FlagParser
from utils.page import run_page
from utils.run_folder import RUNS


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A grid with what its cells and its folder need.

    setup: what all rows must share, by name. command: what to type for a line of the table; None: no advice is given.
    paths: of rows, table, plot and figures, by their endings.
    """

    title: str
    grid: Grid
    source_of: Callable[[Cell], Source]
    setup: Mapping[str, Any]
    command: Callable[[Line], str] | None
    paths: Mapping[str, Path]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    study = preset_study(args) if args.preset else data_study(args)
    failed = 0
    try:
        if args.report_only:
            check_setup(rows := read_rows(study.paths["jsonl"]), study)
        else:
            with RowFile(study.paths["jsonl"]) as file:
                check_setup(file.rows, study)
                failed = run(study, file, args)
                rows = file.rows
    except KeyboardInterrupt:
        print("\nstopped; finished trainings are kept, and the same command goes on with the others")
        raise
    if args.seeds:
        rows = [row for row in rows if row["role"] == "tune" or row["seed"] in args.seeds]
    show(study, rows)
    if failed:
        raise SystemExit(f"{failed} trainings failed; the same command tries them again")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    command, _, description = inspect.cleandoc(__doc__ or "").partition("\n")
    parser = FlagParser(prog=command, description=description.strip(), allow_abbrev=False)
    add = parser.add_argument
    add("--data", metavar="PATH", help="data set, as train.py's --data")
    add("--preset", choices=PRESETS, help="a built-in study in place of --data (docs/small-batch.md)")
    add("--cfg", help="network, as train.py's --cfg")
    add("--weights", metavar="FILE", help="weights to start from, as train.py's --weights (default: from scratch)")
    add("--norms", nargs="+", metavar="NORM", help="what is typed after train.py's --norm, 'in quotes'; bn is added")
    add("--images-per-forward", nargs="+", type=positive, metavar="N", help="(default: 1 2)")
    add("--seeds", type=seeds, metavar="N", help="1 to N, or N-M, and a table of these (default: 5, a table of all)")
    add("--rates", nargs="+", default=["tune"], metavar="RATE", help=RATES_HELP)
    add("--train", default="", metavar="FLAGS", help="more of train.py, in quotes: '--epochs 30 --image-size 320'")
    add("--hours", type=float, metavar="H", help="start no training that would end later than this")
    add("--jobs", type=int, metavar="N", help="trainings side by side (default: as many as cores, 1 on a GPU)")
    add("--device", default="auto", help="as train.py's")
    add("--workers", type=int, default=0, metavar="N", help="loader processes of each training (default: 0)")
    add("--bccd", metavar="PATH", help="with --preset: the folder of BCCD, without which its cells are left out")
    add("--report-only", action="store_true", help="print the table and draw the plot of the existing rows")
    add("--out", metavar="DIR", help="folder of rows, table and plot (default: runs/study-DATA; of a preset, its own)")
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--train" in argv[:-1]:  # what follows may look like a flag of this page
        at = argv.index("--train")
        argv[at : at + 2] = [f"--train={argv[at + 1]}"]
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.preset):
        parser.error("give --data PATH, or --preset for a built-in study")
    fixed = {"--cfg": args.cfg, "--weights": args.weights, "--train": args.train, "--rates": args.rates != ["tune"]}
    if args.preset and (typed := [flag for flag, value in fixed.items() if value]):
        parser.error(f"--preset has settings of its own: {typed[0]} goes with --data")
    return args


RATES_HELP = (
    "learning rates to choose from on the selection split, for each norm and number of images; default: the recipe's "
    "own, as train.py takes it; tune (the default): a third of that, that, and three times that"
)


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 1")
    return int(text)


def seeds(text: str) -> range:
    """Read `10`, seeds 1 to 10, or `6-10`, such as those not used when a norm was chosen."""
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} must be a number, or two as in 6-10")
    found = range(int(first), int(last) + 1) if dash else range(TUNE_SEED + 1, int(first) + 1)
    if not found or TUNE_SEED in found:
        raise argparse.ArgumentTypeError(f"{text} has no seed from 1 on")
    return found


def rates(typed: Sequence[str]) -> Sequence[float] | str:
    """Return typed learning rates as numbers; `tune` and `default` as they are. Raises UserError."""
    if len(typed) == 1 and typed[0] in ("tune", "default"):
        return typed[0]
    try:
        found = [float(rate) for rate in typed]
    except ValueError:
        found = []
    if not found or not all(0 < rate < math.inf for rate in found):
        raise UserError(f"--rates {' '.join(typed)}: give numbers above 0, or tune or default alone")
    return found


def preset_study(args: argparse.Namespace) -> Study:
    """Return the built-in study, with what the command line chooses. Raises UserError for what is no norm."""
    grid = PRESETS[args.preset]
    tasks = grid.tasks
    if args.bccd is None and not args.report_only and any(task.data == "bccd" for task in tasks):
        warn("bccd is left out: give its folder with --bccd")
        tasks = tuple(task for task in tasks if task.data != "bccd")
    typed = tuple(canonical(norm, from_weights=False) for norm in args.norms or ())
    grid = replace(
        grid,
        tasks=tasks,
        recipes=with_references(typed, grid.reference_of) if typed else grid.recipes,
        mini_batches=tuple(args.images_per_forward or grid.mini_batches),
        seeds=args.seeds or grid.seeds,
    )
    if uneven := [images for images in grid.mini_batches if grid.batch_size % images]:
        raise UserError(f"--images-per-forward {uneven[0]} does not divide its batch of {grid.batch_size} images")
    folder = Path(args.out or RESULTS)
    return Study(
        title=f"Study {args.preset}",
        grid=grid,
        source_of=partial(preset_source, bccd=args.bccd),
        setup={},
        command=None,
        paths={end: folder / f"{args.preset}.{end}" for end in ("jsonl", "md", "png", "json")},
    )


def data_study(args: argparse.Namespace) -> Study:
    """Return the study of a reader's data, and print what it is. Raises UserError or CfgError for what is wrong."""
    own = own_study(
        args.data,
        cfg=args.cfg,
        weights=args.weights,
        norms=args.norms or ("bn", "cmbn:carry"),
        mini_batches=args.images_per_forward or (1, 2),
        rates=rates(args.rates),
        seeds=args.seeds or range(1, 6),
        train=args.train,
        more=more_settings(args),
    )
    announce(own)
    folder = Path(args.out or RUNS / f"study-{own.grid.tasks[0].data}")
    names = {"jsonl": "rows.jsonl", "md": "table.md", "png": "plot.png", "json": "table.json"}
    return Study(
        title=f"Which norm on {own.grid.tasks[0].data}",
        grid=own.grid,
        source_of=partial(own_source, source=own.source),
        setup=own.setup,
        command=partial(command, args, own),
        paths={end: folder / name for end, name in names.items()},
    )


def announce(own: OwnStudy) -> None:
    """Print which images are what, and how many trainings there are."""
    grid, splits = own.grid, own.splits
    parts = {"to train on": splits.train, "to select by (val)": splits.val, "to test on": splits.test}
    say("data", f"{grid.tasks[0].data}: " + ", ".join(f"{len(part)} images {what}" for what, part in parts.items()))
    say("", splits.origin)
    say("network", f"{grid.tasks[0].net}, {grid.steps} steps on batches of {grid.batch_size}")
    tuned, main = len(grid.tune_cells()), len(grid.main_cells((), untuned=0.0))
    say("study", f"{tuned} trainings to find learning rates (seed {TUNE_SEED}), {main} to compare norms")


def more_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"device": args.device, "workers": args.workers}


def command(args: argparse.Namespace, own: OwnStudy, line: Line) -> str:
    """Return the train.py command of a line."""
    flags = ["--data", args.data, "--norm", *line.recipe.split(), "--batch-size", str(own.grid.batch_size)]
    flags += ["--subdivisions", str(own.grid.batch_size // line.mini_batch), "--learning-rate", f"{line.rate:g}"]
    for flag, value in (("--cfg", args.cfg), ("--weights", args.weights)):
        flags += [flag, value] if value else []
    typed = shlex.split(args.train)
    if "--batch-size" in typed:
        del typed[typed.index("--batch-size") :][:2]
    return "python train.py " + shlex.join([*flags, *typed])


def check_setup(rows: Sequence[Row], study: Study) -> None:
    """Raise UserError if rows are of another setup: they cannot be compared. Of another machine it only warns."""
    now, path = json.loads(json.dumps(study.setup)), study.paths["jsonl"]
    for row in rows:
        before = row.get("setup", {})
        if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            name = changed[0]
            raise UserError(
                f"{path}: its trainings had another {name} ({before.get(name)}, now {now.get(name)}), and do not "
                "compare with these: choose another folder with --out"
            )
    devices = {row["machine"]["device"] for row in rows}
    if len(devices) > 1:
        warn(f"{path} has trainings of several kinds of devices: {', '.join(sorted(devices))}")


def run(study: Study, file: RowFile, args: argparse.Namespace) -> int:
    """Run the tuning, then the main cells with known rates. Returns how many failed."""
    grid, deadline = study.grid, time.monotonic() + 3600 * args.hours if args.hours else float("inf")
    planned = [*left(grid.tune_cells(), file.rows), *left(grid.main_cells(file.rows, untuned=0.0), file.rows)]
    jobs = args.jobs if args.jobs is not None else 1 if pick_device(args.device).type == "cuda" else os.cpu_count() or 1
    progress = Progress(planned, file.rows, jobs=jobs, deadline=deadline)
    work = partial(run_cell, source_of=study.source_of, more=more_settings(args), commit=code_version())
    failed = 0
    for cells in (grid.tune_cells, lambda: grid.main_cells(file.rows)):
        waiting = list(left(cells(), file.rows))
        for cell in {cell.task: cell for cell in waiting}.values():
            study.source_of(cell)  # once, before processes side by side would all make the digits
        for outcome in run_cells(waiting, work, jobs=jobs, may_start=progress.ends_in_time):
            if outcome.row is None:
                failed += 1
                print(outcome.log_tail, file=sys.stderr)
            else:
                file.append({**outcome.row, "jobs": jobs, "setup": study.setup})
            print(progress.done(outcome.cell, outcome.row), flush=True)
    if remaining := len(list(left(grid.main_cells(file.rows, untuned=0.0), file.rows))):
        print(f"{remaining} trainings are left: the same command goes on with them")
    return failed


def show(study: Study, rows: Sequence[Row]) -> None:
    """Print the table; write it, the plot and the figures beside the rows."""
    lines = Results(rows, study.grid).lines()
    if not lines:
        print("no training has a test result yet, so there is no table")
        return
    sentences = list(advice(lines, study.command)) if study.command else []
    paths = study.paths
    plot(lines, study.grid.stand_in, paths["png"])
    text = report(lines, rows, title=study.title, advice=sentences, plot=paths["png"].name)
    paths["md"].write_text(text)
    paths["json"].write_text(json_report(lines))
    print(f"\n{text}\n{paths['md']}, {paths['png']}")


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Leave through the finally clauses, which end the running cells."""
    raise SystemExit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    run_page(main, CfgError)
