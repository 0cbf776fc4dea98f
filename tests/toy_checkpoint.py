"""A checkpoint of no network in particular, for tests of what is done with checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from utils.checkpoint import Checkpoint


def toy_checkpoint(**fields: Any) -> Checkpoint:
    """Return one with these fields in place of the toy's."""
    toy: dict[str, Any] = {
        "cfg_name": "toy",
        "cfg_text": "[net]\nwidth=32\nheight=64\n",
        "input_hw": (64, 32),
        "letterbox": True,
        "class_names": ("a", "ü"),
        "norm": {"norm": "bn"},
        "weights": {"a": torch.zeros(3, 4)},
    }
    return Checkpoint(**{**toy, **fields})
