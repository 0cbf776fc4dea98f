"""Where numbers stop being finite: in a label, a pixel, a weight, a layer's output, a loss or a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from utils.structures import Batch


def in_inputs(network: nn.Module, parts: Iterable[Batch]) -> str:
    """Which weight, label or pixel is not finite; "" where none is."""
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights {name} are not finite"
    return next((found for part in parts if (found := _in_labels(part) or _in_pixels(part))), "")


@torch.no_grad()
def in_layers(
    network: nn.Module,
    criterion: Callable[[Any, Any], Any],
    parts: Iterable[Batch],
    *,
    autocast: Callable[[], AbstractContextManager[None]],
) -> str:
    """The first layer whose output is not finite, or the loss, found by forwarding all mini-batches again.

    To be asked when a loss was not finite, before the weights are updated. It leaves traces in the norms.
    """
    found = [_in_forward(network, part, criterion, autocast) for part in parts]
    return next(filter(None, found), "")


def in_gradients(network: nn.Module) -> str:
    """Of the layer nearest to the loss, where a backward arrives first."""
    for name, parameter in reversed(list(network.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name} is not finite"
    return ""


def _in_labels(part: Batch) -> str:
    bad = ~torch.isfinite(part.targets.boxes).all(1)
    paths = {part.paths[image] for image in part.targets.image_index[bad].tolist()}
    return f"a box of {' and of '.join(sorted(paths))} is not finite" if paths else ""


def _in_pixels(part: Batch) -> str:
    bad = _images_not_finite(part.pixels())
    return f"a pixel of {part.paths[bad[0]]} is not finite" if bad else ""


def _in_forward(
    network: nn.Module,
    part: Batch,
    criterion: Callable[[Any, Any], Any],
    autocast: Callable[[], AbstractContextManager[None]],
) -> str:
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and output.ndim > 1 and (bad := _images_not_finite(output)):
                images = "any image" if len(bad) == len(part) > 1 else ", ".join(part.paths[i] for i in bad)
                found.append(f"the output of {name} ({type(module).__name__}) is not finite for {images}")

        return look

    handles: list[RemovableHandle] = [
        module.register_forward_hook(hook(name))
        for name, module in network.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        with autocast():
            heads = network.forward(part.pixels())  # past torch.compile, which would not call the hooks
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
