"""From the host to a GPU without waiting for it: it works while the host prepares what comes next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sent(host: Tensor, like: Tensor) -> Tensor:
    """`host` on `like`'s device. A plain `.to` returns only when a GPU has done all that it was told before."""
    return host.to(like.device, non_blocking=like.device.type == "cuda")


def constant(values: Any, like: Tensor) -> Tensor:
    """`like.new_tensor(values)`, which waits in the same way."""
    return sent(torch.tensor(values, dtype=like.dtype), like)
