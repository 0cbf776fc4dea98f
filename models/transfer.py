"""Copies from the host to a GPU that do not wait for it, so that the host can prepare the next work meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device_async(host: Tensor, like: Tensor) -> Tensor:
    """Return `host` on `like`'s device. A plain `.to` from pageable memory synchronizes; this pins the memory first."""
    if like.device.type != "cuda" or host.device.type != "cpu":
        return host.to(like.device)
    return host.pin_memory().to(like.device, non_blocking=True)


def constant_like(values: Sequence[float], like: Tensor) -> Tensor:
    """Return `like.new_tensor(values)`, without its synchronization."""
    return to_device_async(torch.tensor(values, dtype=like.dtype), like)
