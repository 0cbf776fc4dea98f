"""A study of a reader's own data: settings from the command line, checked before anything is trained."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data.image_set import ImageSet
from engine.job import Job, job_of
from engine.recipe import planned_steps
from models.norms.effective_batch import check_values
from models.norms.table import NormOptions
from options import FOREIGN_FLAGS, TrainOptions
from study.cell import Source
from study.grid import Cell, Grid, Task
from study.recipes import BN, canonical, settings_of
from study.splits import Splits, open_splits
from utils.errors import UserError
from utils.flags import flatten, parse_flags

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


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnStudy:
    """A study of one data set. setup: what all its rows must share, by name."""

    grid: Grid
    source: Source
    splits: Splits
    setup: Mapping[str, Any]


def own_source(_cell: Cell, *, source: Source) -> Source:
    return source


def own_study(
    data: str,
    *,
    cfg: str | None,
    weights: str | None,
    norms: Sequence[str],
    mini_batches: Sequence[int],
    rates: Sequence[float] | str,
    seeds: Sequence[int],
    train: str,
    more: Mapping[str, Any],
) -> OwnStudy:
    """Return the study of these settings.

    rates: to choose from; "default" for the recipe's own, "tune" for that times `FACTORS`. train: more of train.py's
    flags, as typed. more: settings that change no result. Raises UserError (or CfgError) for what cannot be trained.
    """
    typed = _typed(train)
    splits = open_splits(data, typed.get("classes", ()))
    typed |= {name: value for name, value in (("cfg", cfg), ("weights", weights)) if value is not None}
    recipes = tuple(dict.fromkeys([BN, *(canonical(norm, from_weights=weights is not None) for norm in norms)]))

    def job_with(recipe: str) -> Job:
        return job_of({**typed, **more, "data": data, **settings_of(recipe)}, (splits.train, splits.val))

    batch = _batch(job_with(BN).options.optim.batch_size, "batch_size" in typed, mini_batches)
    if len(splits.train) < batch:
        raise UserError(
            f"{data}: {len(splits.train)} images to train on are fewer than a batch of {batch}: give "
            f"--train '--batch-size {max(mini_batches)}', fewer --images-per-forward, or more images"
        )
    typed["batch_size"] = batch
    own_rates = {}
    for recipe in recipes:
        job = job_with(recipe)
        for mini_batch in mini_batches:
            check_values(job.plan, job.options.norm, mini_batch=mini_batch)
            own_rates[recipe, mini_batch] = _rates(rates, float(job.options.optim.learning_rate))
    job = job_with(BN)
    task = Task(Path(os.path.abspath(data)).stem, job.plan.name, job.options.augment.mosaic > 0)
    grid = Grid(
        tasks=(task,),
        recipes=recipes,
        mini_batches=tuple(sorted(set(mini_batches))),
        seeds=seeds,
        steps=planned_steps(job.options.optim, len(splits.train)),
        batch_size=batch,
        own_rates=own_rates,
    )
    setup = {
        "data": _digest(*(part for each in (splits.train, splits.val, splits.test) for part in _content(each))),
        "cfg": _digest(job.plan.source_text.encode()),
        "weights": _digest(Path(weights).read_bytes()) if weights else None,
        **{name: value for name, value in flatten(job.options).items() if name not in _NOT_COMPARED},
    }
    return OwnStudy(grid=grid, source=Source(path=data, settings=typed), splits=splits, setup=setup)


def _typed(train: str) -> dict[str, Any]:
    """Return the settings that are typed in --train. Raises UserError for those that the study makes."""
    typed = parse_flags(TrainOptions, shlex.split(train), foreign=FOREIGN_FLAGS)
    for name in typed.keys() & _INSTEAD.keys():
        raise UserError(f"--train: --{name.replace('_', '-')} {_INSTEAD[name]}")
    return typed


def _batch(batch: int, is_typed: bool, mini_batches: Sequence[int]) -> int:
    """Return the images of a batch: the recipe's, or the next multiple of the most that a forward sees.

    Raises UserError if it cannot be cut into forwards of these sizes.
    """
    most = max(mini_batches)
    batch = batch if is_typed else -(-batch // most) * most
    if uneven := [images for images in mini_batches if batch % images]:
        raise UserError(
            f"--images-per-forward {uneven[0]} does not divide a batch of {batch} images: give others, or a batch that "
            "all of them divide, as --train '--batch-size 16'"
        )
    return batch


def _rates(rates: Sequence[float] | str, own: float) -> tuple[float, ...]:
    """Return the learning rates to choose from, ascending. own: the recipe's."""
    if rates == "default":
        return (own,)
    chosen = [own * factor for factor in FACTORS] if isinstance(rates, str) else rates
    return tuple(sorted({float(f"{rate:.3g}") for rate in chosen}))


def _content(part: ImageSet) -> list[bytes]:
    names = [os.path.basename(path) for path in part.paths.tolist()]
    return [*names, part.boxes.tobytes(), part.labels.tobytes(), "\n".join(part.class_names).encode(), b"/"]


def _digest(*content: bytes) -> str:
    return blake2b(b"\0".join(content), digest_size=6).hexdigest()
