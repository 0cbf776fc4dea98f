"""The parts of a training, each made from the job's settings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cfg.plan import Plan
from data.image_set import ImageSet
from data.loader import InputSizes, TrainLoader, make_train_loader
from engine.amp import MixedPrecision
from engine.oom_recovery import OutOfMemoryRecovery
from engine.recipe import BETAS
from engine.shuffle import ShuffledForward
from engine.step import TrainStep
from models.network import Network, parameter_groups
from models.norms.factory import norm_factory
from models.yolo.criterion import make_criterion
from options import TrainOptions
from utils import ranks
from utils.clock import BatchClock
from utils.console import counted
from utils.errors import UserError
from utils.schedule import Schedule


def make_network(options: TrainOptions, plan: Plan, device: torch.device) -> Network:
    """Return the network with random weights, in training mode.

    Raises UserError for norms that communicate, if ranks would call them at different mini-batches.
    """
    network = Network(plan, norm_factory(options.norm, plan, domains=len(options.data))).to(device)
    if splits_by_domain(options) and pools_over_ranks(network):
        raise UserError(
            f"--norm {options.norm.norm} pools over ranks, whose mini-batches have images of different domains: take "
            "--domain-statistics shared with --domain-batches mixed, or a norm without sync"
        )
    if options.speed.checkpoint_activations:
        network.recompute_activations()
    if options.speed.channels_last == "on":
        network.to(memory_format=torch.channels_last)
    return network


def pools_over_ranks(network: Network) -> bool:
    """Return whether norms communicate in the forward."""
    return ranks.world_size() > 1 and any(getattr(module, "sync", False) for module in network.modules())


def check_network(options: TrainOptions, plan: Plan) -> None:
    """Raise what `make_network` does for settings that contradict each other, without memory for the network."""
    with torch.device("meta"):
        make_network(options, plan, torch.device("meta"))


def make_forward(options: TrainOptions, network: Network) -> nn.Module:
    """Return the network as all ranks run it: with --shuffle-bn on shuffled images, else itself."""
    is_shuffled = options.norm.shuffle_bn and ranks.world_size() > 1
    return ShuffledForward(network, options.seed) if is_shuffled else network


def make_step(options: TrainOptions, network: Network, forward: nn.Module, say: Callable[[str], None]) -> TrainStep:
    """Return the training step. forward: see `TrainStep`. say: prints a line for the user."""
    optim, device = options.optim, next(network.parameters()).device
    communicates = forward is not network or pools_over_ranks(network)
    groups = parameter_groups(network, weight_decay=optim.weight_decay, backbone_rate=optim.backbone_rate)
    # The loop sets lr before each step.
    if optim.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum)
    return TrainStep(
        network=network,
        forward=forward,
        criterion=make_criterion(options.loss),
        optimizer=optimizer,
        precision=MixedPrecision(optim.amp, device),
        clock=BatchClock(forward),
        recovery=OutOfMemoryRecovery(network, subdivisions=int(optim.subdivisions), communicates=communicates, say=say),
        clip_norm=optim.clip_norm,
        by_domain=options.domain_batches == "one",
        offload_activations=options.speed.offload_activations and device.type == "cuda",
    )


def input_sizes(options: TrainOptions, plan: Plan) -> InputSizes:
    return InputSizes(plan.net.input_hw, options.multi_scale, plan.size_step_px)


def make_loader(options: TrainOptions, plan: Plan, train_set: ImageSet) -> TrainLoader:
    """Return the loader of this rank's share of the training batches."""
    return make_train_loader(
        train_set,
        input_sizes(options, plan),
        batch_size=options.optim.batch_size,
        augment=options.augment,
        seed=options.seed,
        workers=options.workers,
        cache=options.cache,
        balance=options.balance,
        rank=ranks.rank(),
        ranks=ranks.world_size(),
        by_domain=options.domain_batches == "one",
        is_apart=keeps_apart(options),
    )


def splits_by_domain(options: TrainOptions) -> bool:
    """Return whether statistics are of one domain's images in a mini-batch, however few there are."""
    return options.domain_batches == "one" or options.norm.domain_statistics == "own"


def keeps_apart(options: TrainOptions) -> bool:
    """Return whether something depends on an image's domain, so that a mosaic must not have several."""
    return splits_by_domain(options) or options.norm.domain_affine == "own"


def make_schedule(options: TrainOptions, plan: Plan, *, total_steps: int) -> Schedule:
    """Return the learning-rate schedule.

    A cfg's steps and burn-in are meant for its max_batches: unless they are typed, a run of another length keeps their
    proportion. In a much shorter run burn-in may take a tenth: the random start needs it. Raises UserError if the
    policy misses a key in the cfg.
    """
    optim, net = options.optim, plan.net
    steps, burn_in_steps = optim.lr_steps, optim.burn_in_steps
    cfg_steps = net.max_batches or total_steps
    if steps is not None and len(steps) != len(optim.lr_scales):
        raise UserError(
            f"--lr-steps has {counted(len(steps), 'step')} and --lr-scales {counted(len(optim.lr_scales), 'factor')}: "
            "each step needs one"
        )
    if steps is None:
        steps = tuple(step * total_steps // cfg_steps for step in net.steps)
    if burn_in_steps is None:
        in_proportion = net.burn_in_steps * total_steps // cfg_steps
        burn_in_steps = min(net.burn_in_steps, max(in_proportion, total_steps // 10))
    try:
        return Schedule(
            policy=optim.lr_policy,
            base_rate=float("nan" if optim.learning_rate == "auto" else optim.learning_rate),
            final_rate=optim.final_learning_rate,
            total_steps=total_steps,
            burn_in_steps=burn_in_steps,
            power=net.power,
            steps=steps,
            scales=optim.lr_scales,
            cfg_steps=net.max_batches,
            step=net.step,
            scale=net.scale,
            gamma=net.gamma,
            cycle_steps=net.sgdr_cycle,
            cycle_mult=net.sgdr_mult,
        )
    except UserError as error:
        raise UserError(f"{plan.path}: {error}") from error


def compile_for_all_sizes(network: Network) -> None:
    """Compile once for each input size and kind of mini-batch; multi-scale has more than torch's limit of 8."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    network.compile(dynamic=False)
