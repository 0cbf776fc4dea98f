"""The one seed of a run."""

from __future__ import annotations

import random

import numpy as np
import torch

from utils.errors import UserError


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device; loader workers get theirs from torch's.

    Raises UserError unless 0 <= seed < 2**32, which is what numpy takes.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} must be at least 0 and less than 2**32")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
