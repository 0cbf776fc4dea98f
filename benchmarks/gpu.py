"""What only a GPU can tell, in one command and 9 minutes: are the norms right there, what do they cost, what fits.

    python benchmarks/gpu.py [--minutes 8.5] [--only SECTION ...] [--data PATH] [--weights FILE]
    python benchmarks/gpu.py --dry-run       # every section once, on tiny shapes, without a GPU too; nothing is stored

Sections, in this order:
    agreement   each norm in float32 against float64 on the CPU, and how far off bf16 and fp16 are
    norm-cost   time and memory of a training step with each norm (benchmarks/norm_cost.py)
    train-step  the same by the way it is computed: bf16, channels last, checkpointed, offloaded (train_step.py)
    memory      the largest mini-batch in 4, 6 and 8 GB, by network, input size and flags (largest_mini_batch.py)
    training    one train.py that fills the time left, with its AP: from scratch, or from --weights

Each measurement is printed and stored as soon as it is made, in benchmarks/results/gpu-NAME.jsonl with GPU, versions
and commit, so a run that is stopped loses one. A section that takes more than its share of the time ends early, what
it saves goes to the next ones. A failure stops nothing else; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a file: Python looks for modules beside it, not in the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import agreement, largest_mini_batch, norm_cost, train_step
from benchmarks.measured import RESULTS, Row, circumstances
from benchmarks.recipes import has_test_split, page
from data.digits import make_digits
from study.rows import RowFile
from utils import ranks
from utils.console import counted
from utils.environment import pick_device
from utils.errors import UserError, exit_on_error
from utils.memory import empty_cache, is_out_of_memory

Task = Callable[[], list[Row]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is measured: the whole, unless a dry run."""

    norms: Sequence[str] = norm_cost.RECIPES
    cost_norms: Sequence[str] = norm_cost.RECIPES
    cost_side_px: int = 224
    cost_mini_batches: Sequence[int] = (1, 2, 4)
    rounds: int = 5
    step_nets: Sequence[str] = ("yolov4-tiny", "yolov4")
    step_ways: Sequence[str] = tuple(name for name, way in train_step.WAYS.items() if not way.compiled)  # takes minutes
    step_side_px: int = 416
    step_images: Sequence[int] = (8, 4, 2, 1)  # the first that fits
    memory_nets: Sequence[str] = ("yolov4", "yolov4-tiny", "yolov4-csp")
    memory_sides_px: Sequence[int] = (416, 608)
    memory_ways: Sequence[str] = tuple(largest_mini_batch.WAYS)
    most_images: int = largest_mini_batch.BATCH
    train_flags: Sequence[str] = ()


TINY = Scale(
    norms=("bn", "cbn", "gn"),
    cost_norms=("bn", "cmbn:carry"),
    cost_side_px=64,
    cost_mini_batches=(1,),
    rounds=1,
    step_nets=("yolov4-pico",),
    step_ways=("eager", "recomputed, offloaded"),
    step_side_px=64,
    step_images=(1,),
    memory_nets=("yolov4-pico",),
    memory_sides_px=(64,),
    memory_ways=("float32", "checkpointed, offloaded"),
    most_images=1,
    train_flags=("--max-steps", "1", "--evals", "1", "--image-size", "64", "--batch-size", "2", "--workers", "0"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What was asked for. until: when it has to end, by time.monotonic(). typed_device: for the pages."""

    device: torch.device
    typed_device: str
    scale: Scale
    until: float
    data: str = "digits"
    weights: str | None = None


def agreement_tasks(run: Run) -> Iterator[Task]:
    for recipe in run.scale.norms:
        yield partial(agreement.measure, recipe, run.device)


def norm_cost_tasks(run: Run) -> Iterator[Task]:
    """Yield a few norms beside bn each: all of them at once would not fit into a small GPU."""
    others = [recipe for recipe in run.scale.cost_norms if recipe != "bn"]
    plan, side_px, rounds = norm_cost.headless_tiny("leaky"), run.scale.cost_side_px, run.scale.rounds
    for images in run.scale.cost_mini_batches:
        for start in range(0, len(others), 5):
            recipes = ("bn", *others[start : start + 5])
            yield partial(norm_cost.measure, recipes, plan, side_px, images, norm_cost.FORWARDS, rounds, run.device)


def train_step_tasks(run: Run) -> Iterator[Task]:
    for net in run.scale.step_nets:
        for way in train_step.ways_on(run.device):
            if way in run.scale.step_ways:
                yield partial(beside_eager, net, way, run)


def beside_eager(net: str, way: str, run: Run) -> list[Row]:
    """Measure with as many images as fit. Raises what the smallest number raises."""
    scale, ways = run.scale, list(dict.fromkeys(["eager", way]))
    for images in scale.step_images[:-1]:
        if train_step.WAYS[way].offloads and not largest_mini_batch.host_holds(images):  # yolov4: 0.6 GB an image
            continue
        try:
            return train_step.measure(net, scale.step_side_px, ways, images, scale.rounds, run.device)[-1:]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
    return train_step.measure(net, scale.step_side_px, ways, scale.step_images[-1], scale.rounds, run.device)[-1:]


def step_lines(rows: Sequence[Row]) -> str:
    return "\n".join(f"{train_step.line(row)}  {counted(row['images'], 'image')}" for row in rows)


def memory_tasks(run: Run) -> Iterator[Task]:
    scale = run.scale
    for side_px in scale.memory_sides_px:
        for net in scale.memory_nets:
            for way in scale.memory_ways:
                yield partial(largest_mini_batch.measure, net, side_px, way, run.device, most=scale.most_images)


def training_tasks(run: Run) -> Iterator[Task]:
    yield partial(train_and_test, run)


def train_and_test(run: Run) -> list[Row]:
    """Train by the defaults for the time that is left, and measure AP on the test split, or on val without one."""
    split = "test" if has_test_split(run.data) else "val"  # makes the digits, before the clock is asked
    flags = list(run.scale.train_flags)
    if "--max-steps" not in flags:  # evaluation, and the start of two processes, take some of it, too
        flags += ["--time-budget", f"{max(30, round(0.7 * (run.until - time.monotonic())))}s"]
    row: Row = {"data": Path(run.data).name, "weights": Path(run.weights or "").name, "flags": " ".join(flags)}
    print(f"train.py --data {row['data']} {row['flags']}", flush=True)
    start_from = ["--data", run.data, *(["--weights", run.weights] if run.weights else [])]
    with tempfile.TemporaryDirectory() as scratch:
        folder, start = Path(scratch) / "run", time.perf_counter()
        code = page("train.py", *start_from, *flags, "--device", run.typed_device, "--out", str(folder))
        seconds = time.perf_counter() - start
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        row |= {"seconds": round(seconds, 1), "diverged": code == 3, "ok": code == 0}
        row |= {name: settings[name] for name in ("norm", "batch_size", "subdivisions", "amp", "total_steps")}
        if code == 0:
            report = folder  # of the best weights on val
            if split == "test":
                report = Path(scratch) / "report"
                where = ["--data", run.data, "--split", split, "--device", run.typed_device, "--out", str(report)]
                page("evaluate.py", "--weights", str(folder / "best.pt"), *where)
            metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
            row |= {"split": split, "AP": round(metrics["AP"], 4), "AP50": round(metrics["AP50"], 4)}
    return [row]


def training_line(rows: Sequence[Row]) -> str:
    (row,) = rows
    found = "diverged" if row["diverged"] else f"AP {row['AP']:.3f}, AP50 {row['AP50']:.3f} on {row['split']}"
    return f"{found} after {row['total_steps']} steps, {row['seconds']:.0f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """tasks: its measurements. show: the text for one measurement's rows. share: of the time."""

    tasks: Callable[[Run], Iterator[Task]]
    show: Callable[[list[Row]], str]
    share: float


SECTIONS = {
    "agreement": Section(tasks=agreement_tasks, show=agreement.lines, share=0.1),
    "norm-cost": Section(tasks=norm_cost_tasks, show=norm_cost.table, share=0.2),
    "train-step": Section(tasks=train_step_tasks, show=step_lines, share=0.2),
    "memory": Section(tasks=memory_tasks, show=largest_mini_batch.lines, share=0.3),
    "training": Section(tasks=training_tasks, show=training_line, share=0.2),
}


@dataclass(kw_only=True)
class Report:
    """Prints measurements, stores their rows and remembers failures. file: None stores nothing."""

    common: Row
    file: RowFile | None
    failures: list[str] = field(default_factory=list)

    def measure(self, name: str, section: Section, run: Run) -> None:
        """Make the section's measurements, the first in any case, the others until the run's end."""
        print(f"\n== {name}", flush=True)
        tasks = list(section.tasks(run))
        for number, task in enumerate(tasks):
            if number and time.monotonic() > run.until:
                print(f"{name}: its time is over, {len(tasks) - number} of {len(tasks)} measurements are left out")
                break
            try:
                rows = task()
            except Exception:  # whatever it is, the others can still be measured
                self.failures.append(f"{name}, measurement {number + 1} of {len(tasks)}")
                traceback.print_exc()
            else:
                print(section.show(rows), flush=True)
                self._keep(name, rows)
            free_memory()

    def _keep(self, name: str, rows: list[Row]) -> None:
        for row in rows:
            if self.file is not None:
                self.file.append({"section": name, **row, **self.common})
            if not row.get("ok", True):
                self.failures.append(f"{name}, {', '.join(str(value) for value in list(row.values())[:3])}")


def free_memory() -> None:
    gc.collect()
    empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = ranks.local_device(pick_device(args.device))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # the index, which a cap has to be told
    elif not args.dry_run:
        raise UserError(f"torch {torch.__version__} finds no CUDA GPU here; --dry-run needs none, and measures nothing")
    common = where(device)
    print(", ".join(f"{name} {value}" for name, value in common.items()))
    path = args.out or RESULTS / f"gpu-{common['device'].replace(' ', '-')}.jsonl"
    print("a dry run: nothing here is a measurement" if args.dry_run else f"rows go to {path}")
    with tempfile.TemporaryDirectory() as scratch, nullcontext() if args.dry_run else RowFile(path) as file:
        if args.dry_run and args.data == "digits":
            args.data = str(make_digits(Path(scratch) / "digits", counts={"train": 4, "val": 2}, hw=(64, 64)))
        report = Report(common=common, file=file)
        run_sections(args, device, report)
    if report.failures:
        print("\nfailed:", *report.failures, sep="\n  ")
        raise SystemExit(1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="that it may take (default 8.5)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--data", default="digits", metavar="PATH", help="to train on (default: the built-in digits)")
    parser.add_argument("--weights", metavar="FILE", help="to train from (default: from scratch)")
    parser.add_argument("--device", default="auto", help="such as cuda:1")
    parser.add_argument("--dry-run", action="store_true", help="all of it on tiny shapes; nothing is stored")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: benchmarks/results/gpu-NAME.jsonl)")
    args = parser.parse_args(argv)
    args.data, args.weights = absolute(args.data), absolute(args.weights)
    return args


def absolute(path: str | None) -> str | None:
    """Return the path of what exists for pages that run elsewhere; `digits` and None as they are."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def run_sections(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Measure the chosen sections, each with its share of the time and what those before it have left."""
    chosen = {name: section for name, section in SECTIONS.items() if name in args.only}
    seconds = 60 * args.minutes / sum(section.share for section in chosen.values())
    until = time.monotonic()
    for name, section in chosen.items():
        until += seconds * section.share
        run = Run(
            device=device,
            typed_device="auto" if args.dry_run else args.device,  # a child knows of no pretended GPU
            scale=TINY if args.dry_run else Scale(),
            until=until,
            data=args.data,
            weights=args.weights,
        )
        report.measure(name, section, run)


def where(device: torch.device) -> Row:
    """Return hardware, versions and settings that hold for all rows."""
    cudnn = torch.backends.cudnn
    found: Row = {"cuda": torch.version.cuda, "tf32": cudnn.allow_tf32, "cudnn_benchmark": cudnn.benchmark}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["total_GB"] = round(total / 2**30, 2)
        found["outside_torch_GB"] = round((total - free - torch.cuda.memory_reserved(device)) / 2**30, 2)
    return circumstances(device, **found)


if __name__ == "__main__":
    exit_on_error(main)
