"""Opening the data sets of a training, by its settings."""

from __future__ import annotations

import os
from typing import Any

from data.annotation_formats import BUILT_IN, open_image_set, splits_of
from data.domains import Domain, unique_names
from data.image_set import ImageSet
from options import TrainOptions
from utils import ranks
from utils.console import warn
from utils.errors import UserError


def paths_of(data: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the paths of the data sets; earlier checkpoints have a string."""
    return (data,) if isinstance(data, str) else data


def open_domains(given: dict[str, Any]) -> tuple[Domain, ...]:
    """Return the data sets, named apart. Raises UserError if a set is named twice, or another for validation."""
    paths = paths_of(given.get("data", BUILT_IN))
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise UserError("--data names a data set twice")
    if len(paths) > 1 and given.get("val_data"):
        raise UserError("--val-data is for a single --data: several are validated on their own splits")
    pairs = [open_sets({**given, "data": path}, takes_all=len(paths) == 1) for path in paths]
    known = {name for train_set, _ in pairs for name in train_set.class_names}
    if absent := [name for name in given.get("classes", ()) if name not in known]:
        raise UserError(f"--classes: no data set has a class '{absent[0]}'")
    names = unique_names([train_set.name for train_set, _ in pairs])
    return tuple(
        Domain(name=name, train_set=train_set, val_set=val_set)
        for name, (train_set, val_set) in zip(names, pairs, strict=True)
    )


def open_sets(given: dict[str, Any], *, takes_all: bool = True) -> tuple[ImageSet, ImageSet]:
    """Return the training and validation split of one data set; rank 0 makes what is made on first use.

    takes_all: whether it must have each of the classes that were asked for.
    """
    data = given.get("data", "digits")
    fraction = 0 if given.get("val_data") else given.get("val_fraction", TrainOptions().val_fraction)
    if ranks.world_size() > 1:
        if ranks.is_rank_zero():
            open_image_set(data, given.get("train_split", "train"), val_fraction=fraction)
        ranks.broadcast(None)
    train_set = open_image_set(data, given.get("train_split", "train"), val_fraction=fraction)
    if "val_fraction" in given and "resume" not in given and (given.get("val_data") or "val" in splits_of(data)):
        of = given.get("val_data") or f"the split 'val' of {data}"
        warn(f"--val-fraction is not used: {of} is what is evaluated")
    val_set = open_image_set(given.get("val_data") or data, given.get("val_split", "val"), val_fraction=fraction)
    if classes := given.get("classes"):
        known = [name for name in classes if takes_all or name in train_set.class_names]
        train_set = train_set.of_classes(known or classes)
        val_set = val_set.of_classes([name for name in classes if name in val_set.class_names] or classes)
    train_set.require_objects(data)
    val_set.require_objects(given.get("val_data") or data)
    return train_set, val_set
