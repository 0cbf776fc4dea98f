"""The statistics norms normalize by in inference, and the networks that have some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.norms.batch_stat import BatchStatNorm, unbiased
from models.norms.moments import Moments
from models.norms.table import has_batch_statistics
from utils.errors import UserError
from utils.structures import pixels_of


def norms_with_statistics(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> norm. UserError where there is none."""
    found = {name: module for name, module in network.named_modules() if has_batch_statistics(module)}
    if not found:
        raise UserError("the network has no norm with batch statistics (gn, ln, in and none keep no population's)")
    return found


def as_used(norm: nn.Module, moments: Moments) -> Moments:
    """Moments of the norm's input as the norm uses them; of any shape whose last dimension is the channel."""
    return norm.as_used(moments) if isinstance(norm, BatchStatNorm) else moments


@torch.no_grad()
def adopt(norm: nn.Module, population: Moments) -> None:
    """The norm's running statistics become the population's: in place, its other state untouched."""
    of_kind = isinstance(norm, BatchStatNorm)
    mean, var = norm.as_running(population) if of_kind else (population.mean, unbiased(population))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


@torch.no_grad()
def adopt_mini_batch(norm: nn.Module, y: Tensor) -> None:
    """The same from one mini-batch y (N, C, H, W): with the biased variance, as in training."""
    own = Moments.of(y)
    adopt(norm, Moments(count=torch.ones_like(own.count), mean=own.mean, var=own.var))  # of one, no N / (N - 1)


@contextmanager
def watched(norms: Iterable[nn.Module], look: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Each forward of these norms begins with look(norm, its input)."""
    hooks = [norm.register_forward_pre_hook(lambda norm, inputs: look(norm, inputs[0])) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Every module is in eval mode, and afterwards in the one it was found in."""
    found = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in found:
            module.training = training


def pixels_for(network: nn.Module, images: Tensor) -> Tensor:
    """(N, 3, H, W), uint8 or float in 0..1, as the network takes them: float, on its device."""
    return pixels_of(images.to(next(network.parameters()).device))
