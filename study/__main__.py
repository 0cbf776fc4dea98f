"""python -m study

Which norm on my data: train with each norm, at each number of images in a forward, with several seeds, and compare AP
on images that no training has seen. Every training takes equally many steps on batches of the same size, cut into
forwards; a seed fixes initial weights, order of images and augmentation, for all norms. docs/study.md has more.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType

from cfg.parse import CfgError
from study.cell import Study, code_version, run_cell
from study.grid import CELL_FIELDS, TUNE_SEED, Row, cell_of, left
from study.own import own_study
from study.plot import plot
from study.presets import PRESETS, preset_study
from study.processes import run_cells
from study.progress import Progress
from study.report import Results, advice, json_report, report
from study.rows import RowFile, read_rows
from utils.atomic_file import write_text
from utils.console import warn
from utils.environment import pick_device
from utils.errors import UserError
from utils.flags import FlagParser
from utils.page import run_page


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    study = preset_study(args) if args.preset else own_study(args)
    failed = 0
    try:
        if args.report_only:
            check_setup(rows := read_rows(study.paths["jsonl"]), study)
        else:
            with RowFile(study.paths["jsonl"]) as file:
                check_setup(file.rows, study)
                failed = run(study, file, args)
                rows = file.rows
    except (KeyboardInterrupt, Terminated):
        print("\nstopped; finished trainings are kept: the same command goes on, --report-only shows what is there")
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
    add("--data", nargs="+", metavar="PATH", help="data set, as train.py's --data, but one")
    add("--preset", choices=PRESETS, help="a built-in study in place of --data (docs/small-batch-grid.md)")
    add("--cfg", help="network, as train.py's --cfg")
    add("--weights", metavar="FILE", help="weights to start from, as train.py's --weights (default: from scratch)")
    add("--norms", nargs="+", metavar="NORM", help="what is typed after train.py's --norm, 'in quotes'; bn is added")
    add("--images-per-forward", nargs="+", type=positive, metavar="N", help="(default: 1 2)")
    add("--seeds", type=seeds, metavar="N", help="1 to N, or N-M, and a table of these (default: 5, a table of all)")
    add("--rates", nargs="+", default=["tune"], metavar="RATE", help=RATES_HELP)
    add("--train", default="", metavar="FLAGS", help="more of train.py, in quotes: '--epochs 30 --image-size 320'")
    add("--hours", type=hours, metavar="H", help="start no training that would end later than this")
    add("--jobs", type=not_negative, metavar="N", help="trainings side by side (default: as many as cores, 1 on a GPU)")
    add("--device", default="auto", help="as train.py's")
    add("--workers", type=not_negative, default=0, metavar="N", help="loader processes of each training (default: 0)")
    add("--bccd", metavar="PATH", help="with --preset: the folder of BCCD, without which its cells are left out")
    add("--report-only", action="store_true", help="print the table and draw the plot of the existing rows")
    add("--out", metavar="DIR", help="folder of rows, table and plot (default: runs/study-DATA; of a preset, its own)")
    argv = list(sys.argv[1:] if argv is None else argv)
    for at in reversed([at for at, word in enumerate(argv[:-1]) if word == "--train"]):
        argv[at : at + 2] = [f"--train={argv[at + 1]}"]  # what follows may look like a flag of this page
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.preset):
        parser.error("give --data PATH, or --preset for a built-in study")
    if len(args.data or ()) > 1:
        parser.error(f"--data takes one data set here, found {' and '.join(args.data)}: run a study of each")
    args.data = args.data and args.data[0]
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


def not_negative(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 0")
    return int(text)


def hours(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text} must be a number of hours above 0, such as 8 or 0.5")
    return found


def seeds(text: str) -> range:
    """Read `10`, seeds 1 to 10, or `6-10`, such as those not used when a norm was chosen."""
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} must be a number, or two as in 6-10")
    found = range(int(first), int(last) + 1) if dash else range(TUNE_SEED + 1, int(first) + 1)
    if not found or TUNE_SEED in found:
        raise argparse.ArgumentTypeError(f"{text} has no seed from 1 on")
    return found


_NEEDED = {*CELL_FIELDS, "val_AP", "test_AP", "diverged", "machine", "seconds", "date", "commit"}


def check_setup(rows: Sequence[Row], study: Study) -> None:
    """Raise UserError if rows lack values, or are of another setup: they do not compare. Of other machines only warn.

    Settings that earlier versions did not have are not compared.
    """
    now, path = json.loads(json.dumps(study.setup)), study.paths["jsonl"]
    for number, row in enumerate(rows, start=1):
        if lacking := sorted(_NEEDED - row.keys()):
            raise UserError(f"{path}:{number}: lacks {', '.join(lacking)}; delete that line, and it is trained again")
        before = row.get("setup", {})
        if name := next((name for name in before if name in now and before[name] != now[name]), None):
            raise UserError(
                f"{path}: its trainings had another {name} ({before[name]}, now {now[name]}), and do not compare with "
                "these: choose another folder with --out"
            )
    devices = {row["machine"]["device"] for row in rows}
    if len(devices) > 1:
        warn(f"{path} has trainings of several kinds of devices: {', '.join(sorted(devices))}")


def run(study: Study, file: RowFile, args: argparse.Namespace) -> int:
    """Run the tuning, then the main cells with known rates. Returns how many failed."""
    grid, deadline = study.grid, time.monotonic() + 3600 * args.hours if args.hours else float("inf")
    planned = [*left(grid.tune_cells(), file.rows), *left(grid.main_cells(file.rows, untuned=0.0), file.rows)]
    many = 1 if pick_device(args.device).type == "cuda" else os.cpu_count() or 1
    jobs = many if args.jobs is None else args.jobs
    progress = Progress(planned, file.rows, jobs=jobs, deadline=deadline)
    work = partial(
        run_cell,
        source_of=study.source_of,
        more={"device": args.device, "workers": args.workers},
        commit=code_version(),
    )
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
        for row in rows:
            cell = cell_of(row)
            print(f"tuning {cell.recipe} at {cell.mini_batch}, rate {cell.rate:g}: AP {100 * row['val_AP']:.1f} on val")
        return
    sentences = list(advice(lines, study.command)) if study.command else []
    paths = study.paths
    plot(lines, study.grid.stand_in, paths["png"])
    text = report(lines, rows, title=study.title, sentences=sentences, plot=paths["png"].name)
    write_text(paths["md"], text)
    write_text(paths["json"], json_report(lines))
    print(f"\n{text}\n{paths['md']}, {paths['png']}")


class Terminated(SystemExit):
    """SIGTERM, which leaves through the finally clauses, as they end the running cells."""


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise Terminated(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    run_page(main, CfgError)
