"""The running statistics that norms normalize by in inference, and the networks that have some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm, unbiased
from models.norms.bn import FrozenBatchNorm
from models.norms.moments import Moments
from models.norms.table import NORMS
from utils.errors import UserError
from utils.structures import pixels_of


def has_running_statistics(norm: nn.Module) -> bool:
    """Return whether the norm has running statistics, of its own training or of the network it was loaded from."""
    return getattr(norm, "running_mean", None) is not None


def is_batch_norm(norm: nn.Module) -> bool:
    """Return whether in inference the norm is batch norm by its running statistics, whatever it is in training.

    A class of the user's with another forward is not.
    """
    forwards = (BatchStatNorm.forward, FrozenBatchNorm.forward, nn.BatchNorm2d.forward)
    return has_running_statistics(norm) and norm.weight is not None and type(norm).forward in forwards


def norms_with_statistics(network: nn.Module) -> dict[str, nn.Module]:
    """Return the norms with running statistics by name. Raises UserError where there is none."""
    found = {name: module for name, module in network.named_modules() if has_running_statistics(module)}
    if not found:
        without = ", ".join(name for name, spec in NORMS.items() if not spec.has_running_statistics)
        raise UserError(f"the network has no norm with running statistics ({without} keep none)")
    return found


def running_moments(norm: nn.Module) -> Moments:
    """Return the norm's running mean and variance, (C,) each, as a population of one."""
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor) and isinstance(var, Tensor)
    return Moments(count=mean.new_ones(()), mean=mean, var=var)


def as_used(norm: nn.Module, moments: Moments) -> Moments:
    """Return moments of the norm's input as the norm uses them; of any shape whose last dimension is the channel."""
    return norm.as_used(moments) if isinstance(norm, BatchStatNorm) else moments


@torch.no_grad()
def use_population(norm: nn.Module, population: Moments) -> None:
    """Set the norm's running statistics to the population's, in place; its other state stays."""
    if isinstance(norm, BatchStatNorm):
        mean, var = norm.as_running(population)
    else:
        mean, var = population.mean, unbiased(population)
    running = running_moments(norm)
    running.mean.copy_(mean)
    running.var.copy_(var)


@torch.no_grad()
def use_mini_batch(norm: nn.Module, y: Tensor) -> None:
    """Set the norm's running statistics to those of the mini-batch y (N, C, H, W), with the biased variance."""
    own = Moments.of(y)
    of_one = Moments(count=torch.ones_like(own.count), mean=own.mean, var=own.var)  # so without N / (N - 1)
    use_population(norm, of_one)


@contextmanager
def watched(norms: Iterable[nn.Module], look: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Call look(norm, its input) at the beginning of each forward of these norms, within the block."""
    hooks = [norm.register_forward_pre_hook(lambda norm, inputs: look(norm, inputs[0])) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put every module into eval mode for the block, and back into the mode it had."""
    found = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in found:
            module.training = training


def pixels_for(network: nn.Module, images: Tensor) -> Tensor:
    """Return images (N, 3, H, W), uint8 or float in 0..1, as the network takes them: float, on its device."""
    return pixels_of(images.to(next(network.parameters()).device))
