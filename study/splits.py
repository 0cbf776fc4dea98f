"""The three parts of a data set: to train on, to select by, and to test on, which neither of the others ever sees."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from data.annotation_formats import hold_out, open_image_set, splits_of
from data.formats.split_names import WHOLE
from data.image_set import ImageSet
from data.problems import Problems
from utils.errors import UserError

HELD_OUT = 0.2  # of the images, where the data set lacks a split


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """train: makes gradients. val: chooses learning rates and weights. test: is measured once a training, at its end.

    origin: a sentence with where they come from.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    origin: str


def open_splits(path: str, classes: Sequence[str] = ()) -> Splits:
    """Open a data set in three parts: its own splits, where it has them.

    Without a test split its val is for the test; a part of train, chosen by a hash of the names, is then what val was.
    Without either, both are such parts. classes: as train.py's. Raises UserError, also if two parts share an image.
    """
    there = splits_of(path)
    hashed = f"{HELD_OUT:.0%} by a hash of the names"
    if "val" in there and "test" in there:
        train, val, test = (open_image_set(path, split) for split in ("train", "val", "test"))
        origin = "the data set's own splits"
    elif last := next((split for split in ("test", "val") if split in there), None):
        train, val = _divided(open_image_set(path, "train"), HELD_OUT)
        test = open_image_set(path, last)
        origin = f"test is its split '{last}', val {hashed} of its split 'train'"
    else:
        rest, test = _divided(open_image_set(path, WHOLE if there == (WHOLE,) else "train"), HELD_OUT)
        train, val = _divided(rest, HELD_OUT / (1 - HELD_OUT))
        origin = f"nothing divides it: val and test are {hashed} each"
    parts = {
        split: replace(part.of_classes(classes) if classes else part, split=split)
        for split, part in {"train": train, "val": val, "test": test}.items()
    }
    for part in parts.values():
        part.require_objects(path)
    check_apart(*parts.values())
    return Splits(**parts, origin=origin)


def _divided(image_set: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Return the rest, which keeps the problems of all, and the part that is held out."""
    rest, part = (hold_out(image_set, split, fraction) for split in ("train", "val"))
    return rest, replace(part, problems=Problems())


def check_apart(*parts: ImageSet) -> None:
    """Raise UserError if two parts share an image."""
    files = [{os.path.realpath(path) for path in part.paths.tolist()} for part in parts]
    for (one, here), (other, there) in combinations(zip(parts, files, strict=True), 2):
        if common := len(here & there):
            raise UserError(f"{other.name}: its splits '{one.split}' and '{other.split}' share {common} images")
