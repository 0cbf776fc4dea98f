"""The seed of a run, and the state of the random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from utils.environment import cuda_is_in_use


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device; loader workers derive theirs from torch's. seed: 0..2**32-1."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of Python, numpy, torch on the CPU and on a GPU in use, as plain values and tensors."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda_is_in_use() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned; a GPU's state only if one is in use."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and cuda_is_in_use():
        torch.cuda.set_rng_state(state["cuda"])
