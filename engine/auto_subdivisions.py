"""How finely a batch has to be cut to fit into a GPU's memory: `--subdivisions auto`."""

from __future__ import annotations

import torch

from data.loader import InputSizes
from engine.amp import MixedPrecision
from engine.ema import WeightAverage
from engine.job import Job, with_options
from engine.step import MENDS, TrainStep
from engine.trainer import make_network, make_optimizer, say
from models.norms.auto import choose_norm
from models.yolo.criterion import make_criterion
from utils import ranks
from utils.clock import BatchClock
from utils.environment import pick_device
from utils.errors import UserError
from utils.flags import flatten
from utils.memory import empty_cache
from utils.structures import Batch, Targets

_BOXES = 32  # of each image of the dry run: more than most have, as the loss keeps a little for each


def resolve_subdivisions(job: Job) -> Job:
    """The job with a number of subdivisions in place of `auto`; any other as it is.

    The fewest that a dry run shows to fit: a batch of the largest size that multi-scale will draw, with all that a
    training keeps in memory. They divide the batch, and are enough on every rank.
    """
    if job.options.optim.subdivisions != "auto":
        return job
    device = ranks.local_device(pick_device(job.options.device))
    if device.type != "cuda":
        say("memory    --subdivisions auto is for GPUs: a batch is not cut here")
        return with_options(job, subdivisions=1)
    found = max(ranks.all_gather(subdivisions_that_fit(with_options(job, subdivisions=1), device)))
    total = torch.cuda.mem_get_info(device)[1]
    say(f"memory    --subdivisions {found} fits into {total / 2**30:.1f} GiB, by a dry run")
    return with_options(job, subdivisions=found)


def subdivisions_that_fit(job: Job, device: torch.device) -> int:
    """On this rank, whose memory is free again afterwards."""
    # A norm that is chosen by the mini-batch is taken for the one that needs most: that of the smallest.
    norm, _ = choose_norm(job.options.norm, mini_batch=1)
    job = with_options(job, **flatten(norm))
    network = make_network(job, device)
    optimizer = make_optimizer(job, network)
    kept = [torch.zeros_like(p) for group in optimizer.param_groups for p in group["params"]]  # momentum
    average = WeightAverage(network, decay=0.0, warm_up_steps=1)
    step = TrainStep(
        network=network,
        forward=network,
        criterion=make_criterion(job.options.loss),
        optimizer=optimizer,
        precision=MixedPrecision(job.options.optim.amp, device),
        clock=BatchClock(network),
        subdivisions=1,
        clip_norm=None,
        say=lambda line: None,
    )
    batch = noise_batch(job).to(device)
    for step.subdivisions in (n for n in range(1, len(batch) + 1) if len(batch) % n == 0):
        if step.fits(batch):
            break
        empty_cache()
    else:
        raise UserError(f"out of memory with one image of {largest_hw(job)} per forward: {MENDS}")
    found = step.subdivisions
    del network, optimizer, kept, average, step, batch
    empty_cache()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return found


def noise_batch(job: Job) -> Batch:
    """This rank's share of a batch, of the largest size there will be."""
    images = job.options.optim.batch_size // ranks.world_size()
    height, width = largest_hw(job)
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


def largest_hw(job: Job) -> tuple[int, int]:
    """That multi-scale will draw."""
    plan, multi_scale = job.plan, job.options.multi_scale
    if multi_scale == 1:
        return plan.net.input_hw
    return InputSizes(plan.net.input_hw, multi_scale, plan.size_step_px).largest
