"""Names of splits, as the tools write them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

WHOLE = "all"  # the split of a set in which nothing says which image is for what

# In lower case; what a split is called here.
SPELLED = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPELLED |= dict.fromkeys(("val", "valid", "validation"), "val")


def usual_split(name: str) -> str | None:
    """Return train, val or test for `valid`, `Train`, `instances_val2017`; None for a name without one."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPELLED[word] for word in words if word in SPELLED), None)


def split_folders(root: Path) -> dict[str, Path]:
    """Return split -> the folder in `root` that is named after it, such as Roboflow's train, valid and test."""
    folders = (root / name for name in SPELLED)
    return {SPELLED[folder.name]: folder for folder in folders if folder.is_dir()}


def ordered(splits: Iterable[str]) -> tuple[str, ...]:
    """Sort them: train, val, test, then the others."""
    usual = ("train", "val", "test")
    return tuple(sorted(splits, key=lambda split: (usual.index(split) if split in usual else 3, split)))
