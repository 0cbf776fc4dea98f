"""Search for NaN and Inf: in a label, a pixel, a weight, a layer's output, a loss or a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from engine.amp import MixedPrecision
from engine.loss_watch import TrainingLost
from models.network import Network
from models.norms.domains import choose
from models.yolo.criterion import Criterion
from utils import ranks
from utils.structures import Batch


class NotFinite(TrainingLost):
    """A loss or a gradient is NaN or Inf: the training diverged, or the data is bad."""


def find_not_finite(
    network: Network, criterion: Criterion, parts: Sequence[Batch], *, is_loss_finite: bool, precision: MixedPrecision
) -> tuple[str, bool]:
    """Return what is not finite, on any rank, in words, and whether it is the data: a label or a pixel.

    Call it before the weights are updated, on every rank: all search in the same order, because a norm may communicate
    in its forward. Forwards through the mini-batches `parts` again, which changes the statistics of norms.
    """
    if is_loss_finite:
        return _on_any_rank(_in_gradients(network)) or "the norm of the gradient is not finite", False
    if found := _on_any_rank(_in_weights(network)):
        return found, False
    if found := _on_any_rank(next(_in_data(parts), "")):
        return found, True
    # All of them, also after one was found: another rank's forward may wait for this one's.
    in_layers = [_in_forward(network, part, criterion, precision) for part in parts]
    return _on_any_rank(next(filter(None, in_layers), "")) or "the loss is not finite", False


def _on_any_rank(found: str) -> str:
    return "; ".join(dict.fromkeys(filter(None, ranks.all_gather(found))))


def _in_gradients(network: Network) -> str:
    """Name the first gradient that is not finite in the order of the backward."""
    for name, parameter in reversed(list(network.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name} is not finite"
    return ""


def _in_weights(network: Network) -> str:
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights {name} are not finite"
    return ""


def _in_data(parts: Sequence[Batch]) -> Iterator[str]:
    for part in parts:
        bad_boxes = ~torch.isfinite(part.targets.boxes).all(1)
        if paths := {part.paths[image] for image in part.targets.image_index[bad_boxes].tolist()}:
            yield f"a box of {' and of '.join(sorted(paths))} is not finite"
        if bad := _images_not_finite(part.pixels()):
            yield f"a pixel of {part.paths[bad[0]]} is not finite"


@torch.no_grad()
def _in_forward(network: Network, part: Batch, criterion: Criterion, precision: MixedPrecision) -> str:
    found: list[str] = []

    def check(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not found and isinstance(output, Tensor) and output.ndim > 1 and (bad := _images_not_finite(output)):
            images = "any image" if len(bad) == len(part) > 1 else ", ".join(part.paths[i] for i in bad)
            found.append(f"the output of {name} ({type(module).__name__}) is not finite for {images}")

    handles = [
        module.register_forward_hook(partial(check, name))
        for name, module in network.named_modules()
        if not any(True for _ in module.children())
    ]
    choose(network, part.domains)
    try:
        with precision.autocast():
            heads = network.forward(part.pixels())  # not the compiled __call__, which skips hooks
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    losses = criterion(heads, part.targets).detached()
    return "" if torch.isfinite(losses).all() else f"the loss of {', '.join(part.paths)} is not finite"


def _images_not_finite(images: Tensor) -> list[int]:
    """(N, ...) -> the indices along N."""
    return (~torch.isfinite(images.flatten(1)).all(1)).nonzero().flatten().tolist()
