"""The optimizer of a training, and the numbers that go with it (docs/recipe.md).

A cfg's batch, rate and schedule are darknet's recipe for SGD and hundreds of thousands of steps. AdamW has a recipe of
its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cfg.net import NetSpec
from cfg.plan import Plan
from models.norms.options import NormOptions
from models.norms.table import AUTO
from options import OptimOptions, TrainOptions
from utils import ranks
from utils.errors import UserError

BATCH = 16  # images, that the rates are for
KNOWN_RATE, FINE_TUNING_RATE, SCRATCH_RATE = 0.0008, 0.008, 0.012  # of AdamW
# AdamW's usual memory of gradients, 1000 steps, is longer than a short training, whose large first ones would slow it
# down to the end.
BETAS = (0.9, 0.99)
LENGTHS = ("epochs", "max_steps", "time_budget")  # settings, one of which may be typed
SHORT = 1000  # steps; with fewer, half a batch and twice as many do better
MOST_EPOCHS, FEW_STEPS = 300, 1000  # of a training without a typed length
LONG = 20_000  # steps from which on the cfg's own recipe is the one that is published


def choose_optimizer(options: TrainOptions, given: Mapping[str, Any], images: int) -> tuple[str, str]:
    """Return "adamw" or "sgd" and, for `--optimizer auto`, a sentence with the reason.

    given: the settings that were typed. images: of the training set.
    """
    optim = options.optim
    if optim.optimizer != "auto":
        return optim.optimizer, ""
    if options.loss.loss == "darknet":
        return "sgd", "sgd with the cfg's numbers, because --loss darknet is for trainings as darknet's"
    if "momentum" in given:
        return "sgd", "sgd, because --momentum is a setting of it"
    steps = planned_steps(optim, images)
    is_for_other_data = not given.keys() & set(LENGTHS) and usual_steps(optim, images) < steps
    if steps >= LONG and not is_for_other_data and optim.time_budget is None:
        return "sgd", f"sgd with the cfg's numbers, because a training of {steps} steps is what they are meant for"
    return "adamw", f"adamw, because the cfg's numbers for sgd are meant for trainings of {LONG:,} steps and more"


def adamw_recipe(
    options: TrainOptions,
    given: Mapping[str, Any],
    net: NetSpec,
    images: int,
    *,
    knows_classes: bool = False,
    fixed_statistics: bool = False,
) -> dict[str, Any]:
    """Return what AdamW sets in place of the cfg; what was typed goes before it.

    A batch has at most 16 images, or 8 if the epochs would make few steps, and a forward at most as many as the cfg's;
    a cfg's batch=1 is meant for detection and is not taken. The rate grows with the root of the batch, as Adam's noise
    does (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms"); with trained weights
    it is lower, and lower still under statistics that are never measured, as nothing then keeps activations in bounds.
    images: of the training set. knows_classes: whether the weights have heads for all classes; then there is more to
    forget than to learn. fixed_statistics: see `has_fixed_statistics`. Raises UserError for a typed momentum.
    """
    if "momentum" in given:
        raise UserError("--momentum is that of --optimizer sgd; adamw has its own")
    rate = SCRATCH_RATE if options.weights is None else FINE_TUNING_RATE
    if knows_classes:
        rate = KNOWN_RATE
    if fixed_statistics:
        rate /= 4
    default, optim, world_size = OptimOptions(), options.optim, ranks.world_size()
    batch, parts = optim.batch_size, optim.subdivisions
    if "batch_size" not in given:
        batch = BATCH if net.batch == 1 else min(net.batch, BATCH)
        if optim.epochs and planned_steps(replace(optim, batch_size=batch), images) < SHORT:
            batch = min(batch, BATCH // 2)
        multiple = world_size * (int(parts) if "subdivisions" in given and parts != "auto" else 1)
        batch = multiple * math.ceil(batch / multiple)
    if "subdivisions" not in given:
        most_images = batch if net.batch == 1 else max(1, net.batch // net.subdivisions)
        parts = fewest_parts(batch // world_size, most_images=most_images)
    length = {} if given.keys() & set(LENGTHS) else {"max_steps": usual_steps(replace(optim, batch_size=batch), images)}
    return {
        **length,
        "optimizer": "adamw",
        "batch_size": batch,
        "subdivisions": parts,
        "learning_rate": float(f"{rate * math.sqrt(min(batch, images) / BATCH):.3g}"),
        "final_learning_rate": default.final_learning_rate,
        "lr_policy": default.lr_policy,
        "momentum": default.momentum,
    }


def has_fixed_statistics(norm: NormOptions, plan: Plan) -> bool:
    """Return whether some part of the network is to be trained by statistics that are never measured."""
    return norm.norm != AUTO and (norm.never_measures or any(spec.is_frozen for spec in norm.specs(plan)))


def planned_steps(optim: OptimOptions, images: int) -> int:
    """Return the optimizer steps of a training on so many images."""
    return optim.epochs * (images // min(optim.batch_size, images)) if optim.epochs else optim.max_steps


def usual_steps(optim: OptimOptions, images: int) -> int:
    """Return the steps of a training without a typed length: the cfg's, which are made for COCO, if not too many."""
    return min(optim.max_steps, max(FEW_STEPS, MOST_EPOCHS * images // optim.batch_size))


def fewest_parts(images: int, *, most_images: int) -> int:
    """Return the smallest divisor of `images` that makes parts of at most `most_images`."""
    return next(parts for parts in range(1, images + 1) if images % parts == 0 and images // parts <= most_images)
