"""`--subdivisions auto`: the fewest subdivisions that fit into the GPU's memory, found by a dry run."""

from __future__ import annotations

from dataclasses import replace

import torch

from cfg.plan import Plan
from engine.amp import MixedPrecision
from engine.build import input_sizes, make_network, make_optimizer
from engine.ema import WeightAverage
from engine.oom_recovery import OutOfMemoryRecovery
from models.freeze import freeze
from models.norms.auto import choose_norm
from models.yolo.criterion import make_criterion
from options import TrainOptions
from utils import ranks
from utils.clock import BatchClock
from utils.console import say
from utils.environment import pick_device
from utils.memory import empty_cache
from utils.structures import Batch, Targets

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
    options = replace(options, norm=choose_norm(options.norm, mini_batch=1)[0])
    network = make_network(options, plan, device)
    if options.optim.freeze:
        freeze(network, options.optim.freeze)
    optimizer = make_optimizer(options, network)
    _momentum = [torch.zeros_like(p) for group in optimizer.param_groups for p in group["params"]]
    _average = WeightAverage(network, decay=0.0, warm_up_steps=1)
    criterion, precision = make_criterion(options.loss), MixedPrecision(options.optim.amp, device)
    largest_hw = plan.net.input_hw if options.multi_scale == 1 else input_sizes(options, plan).largest
    batch = noise_batch(options.optim.batch_size // ranks.world_size(), largest_hw).to(device)

    def backward(part: Batch) -> None:  # in a function, so that an error leaves no activations in a variable
        with precision.autocast():
            heads = network(part.pixels())
        torch.autograd.backward(precision.scale(criterion(heads, part.targets).total))

    clock = BatchClock(network)
    recovery = OutOfMemoryRecovery(network, subdivisions=1, is_parallel=False, say=lambda line: None)
    for attempt in recovery.attempts(len(batch)):
        with attempt:
            optimizer.zero_grad(set_to_none=True)
            for part in clock.minibatches(batch.split(recovery.subdivisions)):
                backward(part)
    return recovery.subdivisions


def noise_batch(images: int, input_hw: tuple[int, int]) -> Batch:
    """Return images of noise, with many boxes each."""
    height, width = input_hw
    corner = torch.rand(images * _BOXES, 2) * torch.tensor([width / 2, height / 2])
    targets = Targets(
        boxes=torch.cat((corner, corner + torch.tensor([width / 8, height / 8])), 1),
        labels=torch.zeros(images * _BOXES, dtype=torch.long),
        image_index=torch.arange(images).repeat_interleave(_BOXES),
        is_crowd=torch.zeros(images * _BOXES, dtype=torch.bool),
    )
    return Batch(
        images=torch.randint(256, (images, 3, height, width), dtype=torch.uint8),
        targets=targets,
        image_ids=(0,) * images,
        paths=("",) * images,
        placements=(None,) * images,
    )
