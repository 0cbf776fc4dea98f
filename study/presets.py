"""The built-in studies: digits whose light shifts, and blood cells, with a network small enough for a CPU core."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from data.digits import make_digits
from models.norms.cmbn import CrossMiniBatchNormSpec
from study.cell import Source, Study
from study.grid import Cell, Grid, Task, check_forwards
from study.recipes import BN, canonical, options_of, spelled, with_references
from utils.console import warn

HERE = Path(__file__).parent
MADE = HERE.parent / "datasets" / "small_batch"  # ignored by git
RESULTS = HERE.parent / "benchmarks" / "results" / "small_batch"

BATCH = 16  # images of an optimizer step, at every mini-batch size
CENTRALIZED_BN = "bn --weight-centralization"


def preset_study(args: argparse.Namespace) -> Study:
    """Return the built-in study, with what the command line chooses. Raises UserError for what it cannot have."""
    grid: Grid = PRESETS[args.preset]
    tasks = grid.tasks
    if args.bccd is None and not args.report_only and any(task.data == "bccd" for task in tasks):
        warn("bccd is left out: give its folder with --bccd")
        tasks = tuple(task for task in tasks if task.data != "bccd")
    typed = tuple(canonical(norm, from_weights=False) for norm in args.norms or ())
    grid = replace(
        grid,
        tasks=tasks,
        recipes=with_references(typed, reference_of) if typed else grid.recipes,
        mini_batches=tuple(args.images_per_forward or grid.mini_batches),
        seeds=args.seeds or grid.seeds,
    )
    check_forwards(BATCH, grid.mini_batches)
    paths = {end: Path(args.out or RESULTS) / f"{args.preset}.{end}" for end in ("jsonl", "md", "png", "json")}
    source_of = partial(preset_source, bccd=args.bccd)
    return Study(title=f"Study {args.preset}", grid=grid, source_of=source_of, paths=paths)


def preset_source(cell: Cell, *, bccd: str | None) -> Source:
    """Return data and settings of a cell; digits are made if necessary. bccd: the folder of BCCD.

    Arithmetic is the same on CPU and GPU, and burn-in a tenth of the training.
    """
    is_small = cell.net == "small"
    hw = ((96, 128) if cell.data == "bccd" else (80, 80)) if is_small else (416, 416)
    settings: dict[str, Any] = {
        "cfg": str(HERE / "small.cfg") if is_small else "yolov4-tiny",
        "image_size": hw,
        "multi_scale": 1.0,
        "amp": "off",
        "evals": 4,
        "max_steps": cell.steps,
        "optimizer": "sgd",
        "batch_size": BATCH,
        "final_learning_rate": cell.rate / 100,
        "lr_policy": "cosine",
        "burn_in_steps": cell.steps // 10,
        "mosaic": 0.5 if cell.mosaic else 0.0,
    }
    return Source(path=str(bccd) if cell.data == "bccd" else str(_digits(cell, hw[0])), settings=settings)


def _digits(cell: Cell, side: int) -> Path:
    """Make the scenes of `digits-SHIFT`, whose light shifts from image to image by that much."""
    shift, scenes = float(cell.data.removeprefix("digits-")), cell.scenes
    counts = {"train": scenes, "val": min(256, scenes // 4), "test": min(512, scenes // 2)}
    folder = MADE / f"digits-{side}px-{scenes}-shift{shift:g}"
    return make_digits(folder, counts=counts, hw=(side, side), shift=shift)


@cache
def stand_in(recipe: str, mini_batch: int) -> str:
    """Return the recipe that is trained in its place, because it computes the same to the last bit.

    Where a mini-batch is the whole batch, cmbn has nothing to pool: its options, the gradient `darknet` aside, change
    nothing.
    """
    options = options_of(recipe)
    spec = options.spec
    if mini_batch < BATCH or not isinstance(spec, CrossMiniBatchNormSpec) or spec.gradient == "darknet":
        return recipe
    return spelled(replace(options, norm=spec.name))


def reference_of(recipe: str) -> str:
    """Return the recipe that a recipe is compared with: BN, with centralized weights where the recipe has them."""
    return CENTRALIZED_BN if options_of(recipe).weight_centralization else BN


def _tasks(*data: str, net: str = "small", mosaic: bool = False) -> tuple[Task, ...]:
    return tuple(Task(name, net, mosaic) for name in data)


_preset: Callable[..., Grid] = partial(
    Grid,
    batch_size=BATCH,
    stand_in=stand_in,
    reference_of=reference_of,
    # Run before their own rate was tuned. Tables mark borrowed rates by ~.
    borrowed={
        "cmbn:carry,burn_in_steps=0": "cmbn",
        "cmbn:carry,burn_in_steps=51": "cmbn",
        "cmbn:burn_in_steps=51": "cmbn",
        "cbn:window=0,burn_in_steps=51": "cmbn",
    },
)

# Burn-ins are a tenth of the steps, as the learning rate's.
PRESETS = {
    # Shows that it runs; its figures mean nothing.
    "smoke": _preset(
        tasks=_tasks("digits-1"),
        recipes=("bn", "cmbn"),
        mini_batches=(8, 16),
        rates=(0.01,),
        seeds=(1,),
        steps=4,
        scenes=32,
    ),
    "quick": _preset(
        tasks=_tasks("digits-1"),
        recipes=("bn", "cmbn", "cmbn:carry,burn_in_steps=51"),
        mini_batches=(1, 16),
        rates=(0.01,),
        own_rates={("cmbn", 1): (0.02,)},  # of `standard`, which has the same trainings among others
        seeds=range(1, 4),
        steps=512,
        scenes=1024,
    ),
    "standard": _preset(
        tasks=_tasks("digits-1", "digits-0.4", "bccd"),
        recipes=(
            "bn",
            "bn --weight-centralization",
            "bn --norm-freeze-after 0.7",
            "cmbn",
            "cmbn --weight-centralization",
            "cmbn:burn_in_steps=51",
            "cmbn:carry,burn_in_steps=51",
            "cmbn:gradient=share",
            "cmbn:gradient=renorm",
            "cmbn:gradient=darknet",
            "cbn:gradient=share,burn_in_steps=51",
            "cbn:burn_in_steps=51",
            "mabn",
            "gn",
        ),
        mini_batches=(1, 2, 16),
        tuned_at=(1, 16),
        rates=(0.005, 0.01, 0.02),
        seeds=range(1, 6),
        steps=512,
        scenes=1024,
    ),
    "full": _preset(
        tasks=_tasks("digits-1", "digits-0.4", "bccd", net="tiny", mosaic=True),
        recipes=("bn", "cmbn", "cmbn:carry", "cmbn:gradient=share", "cbn", "cbn:gradient=share", "brn", "gn"),
        mini_batches=(1, 2, 4, 8, 16),
        tuned_at=(1, 2, 16),
        rates=(0.0025, 0.005, 0.01),
        seeds=range(1, 6),
        steps=4096,
        scenes=8192,
    ),
}
