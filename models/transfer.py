"""From the host to a GPU without waiting for it: it works while the host prepares what comes next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device_async(host: Tensor, like: Tensor) -> Tensor:
    """`host` on `like`'s device. A plain `.to` returns only when a GPU has done all that it was told before, and so may
    any from memory that is not page-locked."""
    if like.device.type != "cuda" or host.device.type != "cpu":
        return host.to(like.device)
    return host.pin_memory().to(like.device, non_blocking=True)


def constant_like(values: Any, like: Tensor) -> Tensor:
    """`like.new_tensor(values)`, which waits in the same way."""
    return to_device_async(torch.tensor(values, dtype=like.dtype), like)
