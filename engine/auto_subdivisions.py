"""`--subdivisions auto`: the fewest subdivisions that fit into the GPU's memory, found by a dry run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from cfg.plan import Plan
from data.loader import collate
from engine.build import input_sizes, make_network, make_step
from engine.ema import ModelEMA
from models.freeze import freeze
from models.norms.auto import choose_norm
from options import TrainOptions
from utils import ranks
from utils.console import say
from utils.environment import pick_device
from utils.memory import empty_cache
from utils.structures import Batch, Sample

_BOXES = 32  # in each image of the dry run: more than most have, because the loss allocates a little for each


def resolve_subdivisions(options: TrainOptions, plan: Plan) -> TrainOptions:
    """Return the options with a number of subdivisions in place of `auto`, enough on every rank."""
    if options.optim.subdivisions != "auto":
        return options
    device = ranks.local_device(pick_device(options.device))
    if device.type == "cuda":
        found = max(ranks.all_gather(subdivisions_that_fit(options, plan, device)))
        empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        total = torch.cuda.mem_get_info(device)[1]
        say("memory", f"--subdivisions {found} fits into {total / 2**30:.1f} GiB, by a dry run")
    else:
        found = 1
        say("memory", "--subdivisions auto is for GPUs: a batch is not cut here")
    return replace(options, optim=replace(options.optim, subdivisions=found))


def subdivisions_that_fit(options: TrainOptions, plan: Plan, device: torch.device) -> int:
    """Return the fewest subdivisions of this rank's share of a batch that fit, beside all that a training keeps.

    They divide the batch. Its images are of the largest size that multi-scale draws. Raises UserError if a single
    image does not fit.
    """
    # `--norm auto` depends on the answer: measured is what it chooses for the smallest mini-batch, which needs most.
    is_start = options.weights is not None
    norm, _ = choose_norm(options.norm, mini_batch=1, forwards=2, from_weights=is_start, plan=plan)
    options = replace(options, norm=norm, optim=replace(options.optim, subdivisions=1))
    network = make_network(options, plan, device)
    if options.optim.freeze:
        freeze(network, options.optim.freeze)
    step = make_step(options, network, network, say=lambda line: None)
    moments = 2 if options.optim.optimizer == "adamw" else 1
    _moments = [torch.zeros_like(p) for g in step.optimizer.param_groups for p in g["params"] for _ in range(moments)]
    _average = ModelEMA(network, decay=0.0)
    largest_hw = plan.net.input_hw if options.multi_scale == 1 else input_sizes(options, plan).largest
    step(noise_batch(options.optim.batch_size // ranks.world_size(), largest_hw).to(device))
    return step.recovery.subdivisions


def noise_batch(images: int, input_hw: tuple[int, int]) -> Batch:
    """Return equal images of noise, with many boxes each."""
    random, (height, width) = np.random.default_rng(0), input_hw
    corners = random.random((_BOXES, 2)) * [width / 2, height / 2]
    sides = np.full((_BOXES, 2), [width / 8, height / 8])
    sample = Sample(
        image=random.integers(256, size=(height, width, 3), dtype=np.uint8),
        boxes=np.hstack((corners, corners + sides)),
        labels=np.zeros(_BOXES, np.int64),
        is_crowd=np.zeros(_BOXES, bool),
        image_id=0,
        path="",
    )
    return collate([sample] * images)
