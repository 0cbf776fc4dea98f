"""A study of a reader's own data: settings from the command line, checked before anything is trained."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

from data.doctor.checkup import quick_findings
from data.image_set import ImageSet
from engine.job import Job, job_of
from engine.recipe import planned_steps
from models.norms.effective_batch import check_values
from models.norms.options import NormOptions
from models.weights.published import find_weights
from options import FOREIGN_FLAGS, TrainOptions
from study.cell import Source, Study
from study.grid import TUNE_SEED, Cell, Grid, Task, check_forwards
from study.recipes import BN, canonical, settings_of
from study.splits import Splits, open_splits
from utils.console import counted, say, warn
from utils.errors import UserError
from utils.file_name import as_file_name
from utils.flags import flatten, parse_flags
from utils.run_folder import RUNS

FACTORS = (1 / 3, 1, 3)  # of the recipe's own learning rate, to tune among

# Settings of train.py that are not typed in --train, and what is typed instead.
_INSTEAD = {
    **dict.fromkeys(("data", "cfg", "weights", "device", "workers", "out"), "is a flag of the study itself"),
    **dict.fromkeys(("train_split", "val_split", "val_data", "val_fraction"), "is chosen by the study from --data"),
    **dict.fromkeys((f.name for f in fields(NormOptions)), "goes into --norms, as in --norms bn 'bn --norm-eval'"),
    "subdivisions": "follows from --images-per-forward",
    "learning_rate": "is --rates here",
    "seed": "is --seeds here",
    "resume": "is not needed: the same command goes on where the study was",
    "time_budget": "would give slower norms fewer steps: give --epochs",
}
# Settings that change no result, or are recorded in another way.
_NOT_COMPARED = {
    *("data", "val_data", "val_fraction", "train_split", "val_split", "cfg", "weights"),
    *("seed", "subdivisions", "learning_rate", *(f.name for f in fields(NormOptions))),
    *("out", "resume", "save_minutes", "device", "workers", "cache", "eval_backend", "profile"),
}


def own_study(args: argparse.Namespace) -> Study:
    """Return the study of a reader's data, and print what it is. Raises UserError or CfgError for what is wrong."""
    typed = _typed(args.train)
    splits = open_splits(args.data, typed.get("classes", ()))
    typed |= {name: value for name in ("cfg", "weights") if (value := getattr(args, name)) is not None}
    if "weights" in typed:  # once, not in each training
        typed["weights"], typed["cfg"] = find_weights(typed["weights"], typed.get("cfg"))
    norms, mini_batches = args.norms or ("cmbn:carry",), sorted(set(args.images_per_forward or (1, 2)))
    is_fine_tuning = args.weights is not None
    recipes = tuple(dict.fromkeys([BN, *(canonical(norm, from_weights=is_fine_tuning) for norm in norms)]))

    def job_with(recipe: str) -> Job:
        given = {**typed, "data": args.data, "device": args.device, "subdivisions": 1, **settings_of(recipe)}
        return job_of(given, (splits.train, splits.val))

    batch = job_with(BN).options.optim.batch_size
    if "batch_size" not in typed:  # the next one that the most images in a forward divide
        batch = -(-batch // mini_batches[-1]) * mini_batches[-1]
    check_forwards(batch, mini_batches)
    if len(splits.train) < batch:
        raise UserError(f"{args.data}: has {len(splits.train)} images to train on, fewer than a batch of {batch}")
    typed["batch_size"] = batch
    jobs = {recipe: job_with(recipe) for recipe in recipes}
    for job, mini_batch in product(jobs.values(), mini_batches):
        check_values(job.plan, job.options.norm, mini_batch=mini_batch)
    job = jobs[BN]
    task = Task(splits.train.name, job.plan.name, job.options.augment.mosaic > 0)
    rates = {recipe: _rates(args.rates, job.options.optim.learning_rate) for recipe, job in jobs.items()}
    grid = Grid(
        tasks=(task,),
        recipes=recipes,
        mini_batches=tuple(mini_batches),
        seeds=args.seeds or range(1, 6),
        steps=planned_steps(job.options.optim, len(splits.train)),
        batch_size=batch,
        own_rates={(recipe, mini_batch): rates[recipe] for recipe in recipes for mini_batch in mini_batches},
    )
    _announce(grid, splits, args.data)
    folder = Path(args.out or RUNS / as_file_name(f"study-{task.data}"))
    names = {"jsonl": "rows.jsonl", "md": "table.md", "png": "plot.png", "json": "table.json"}
    return Study(
        title=f"Which norm on {task.data}",
        grid=grid,
        source_of=partial(own_source, source=Source(path=args.data, settings=typed)),
        paths={end: folder / name for end, name in names.items()},
        setup=_setup(job, splits, typed.get("weights")),
        command=partial(_command, args, batch),
    )


def own_source(_cell: Cell, *, source: Source) -> Source:
    return source


def _announce(grid: Grid, splits: Splits, path: str) -> None:
    """Print which images are what, what is wrong with them, and how many trainings there are."""
    (task,) = grid.tasks
    uses = {"to train on": splits.train, "to select by (val)": splits.val, "to test on": splits.test}
    say("data", f"{task.data}: " + ", ".join(f"{counted(len(part), 'image')} {use}" for use, part in uses.items()))
    say("", splits.origin)
    if findings := quick_findings(*uses.values()):
        for finding in findings:
            warn(finding)
        say("", f"python -m data.doctor {path}  has details and remedies")
    say("network", f"{task.net}, {grid.steps} steps on batches of {grid.batch_size}")
    tuned, main = len(grid.tune_cells()), len(grid.main_cells((), untuned=0.0))
    say("study", f"{counted(tuned, 'training')} to find learning rates (seed {TUNE_SEED}), {main} to compare norms")


def _command(args: argparse.Namespace, batch: int, recipe: str, mini_batch: int, rate: float) -> str:
    """Return the train.py command of a training."""
    flags = ["--data", args.data, *(["--cfg", args.cfg] if args.cfg else [])]
    flags += ["--weights", args.weights] if args.weights else []
    flags += [*shlex.split(args.train), "--norm", *recipe.split(), "--learning-rate", f"{rate:g}"]
    flags += ["--batch-size", str(batch), "--subdivisions", str(batch // mini_batch)]
    return f"python train.py {shlex.join(flags)}"


def _typed(train: str) -> dict[str, Any]:
    """Return the settings that are typed in --train. Raises UserError for those that the study makes."""
    try:
        words = shlex.split(train)
    except ValueError as error:
        raise UserError(f"--train '{train}': {str(error).lower()}") from error
    typed = parse_flags(TrainOptions, words, foreign=FOREIGN_FLAGS)
    for name in typed.keys() & _INSTEAD.keys():
        raise UserError(f"--train: --{name.replace('_', '-')} {_INSTEAD[name]}")
    return typed


def _rates(typed: Sequence[str], own: float | str) -> tuple[float, ...]:
    """Return the learning rates to choose from, ascending. own: the recipe's. Raises UserError."""
    if typed == ["tune"]:
        rates = [float(own) * factor for factor in FACTORS]
    elif typed == ["default"]:
        rates = [float(own)]
    else:
        try:
            rates = list(map(float, typed))
        except ValueError:
            rates = [math.nan]
    if not all(0 < rate < math.inf for rate in rates):
        raise UserError(f"--rates {' '.join(typed)}: give numbers above 0, or tune or default alone")
    return tuple(sorted({float(f"{rate:.3g}") for rate in rates}))


def _setup(job: Job, splits: Splits, weights: str | None) -> dict[str, Any]:
    """Return what trainings must share to be compared, by name."""
    content = (part for each in (splits.train, splits.val, splits.test) for part in _content(each))
    return {
        "data": f"{splits.train.name} {_digest(*content)}",
        "cfg": _digest(job.plan.source_text.encode()),
        "weights": _digest(Path(weights).read_bytes()) if weights else None,
        **{name: value for name, value in flatten(job.options).items() if name not in _NOT_COMPARED},
    }


def _content(part: ImageSet) -> list[bytes]:
    names = [os.path.basename(path) for path in part.paths.tolist()]
    return [*names, part.boxes.tobytes(), part.labels.tobytes(), "\n".join(part.class_names).encode(), b"/"]


def _digest(*content: bytes) -> str:
    return blake2b(b"\0".join(content), digest_size=6).hexdigest()
