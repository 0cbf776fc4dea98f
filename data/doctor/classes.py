"""Class counts, and whether the training and the other splits agree on their classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.doctor.finding import Finding, findings_at
from data.image_set import ImageSet

_UNSEEN = "The network cannot learn them, though each has outputs in every head. Add images, or take them off the list."
_ONLY_HERE = "The network cannot have learned them, so their AP is zero. Add such images to {train}."
_UNLISTED = "The network has no output for them, and train.py refuses the splits. Give both the same list of classes."
_NOT_MEASURED = "AP leaves them out. Move a few images that show them from {train} to {other}."


def class_counts(image_set: ImageSet, class_names: Sequence[str]) -> np.ndarray:
    """Return (C,) how many objects, without crowds, each of the named classes has."""
    counts = np.bincount(image_set.labels[~image_set.is_crowd], minlength=len(image_set.class_names))
    of_name = dict(zip(image_set.class_names, counts.tolist(), strict=True))
    return np.array([of_name.get(name, 0) for name in class_names], np.int64)


def all_class_names(image_sets: Sequence[ImageSet]) -> list[str]:
    """Return the class names of all sets: in the order of the first one, then those that only others have."""
    return list(dict.fromkeys(name for image_set in image_sets for name in image_set.class_names))


def class_findings(image_sets: Sequence[ImageSet]) -> list[Finding]:
    """Compare the classes of the splits, the training split first. Splits without objects are skipped."""
    train_set, *others = image_sets
    names = all_class_names(image_sets)
    trained = class_counts(train_set, names)
    if not trained.any():
        return []
    listed = set(train_set.class_names)
    unseen = [name for name, count in zip(names, trained, strict=True) if not count and name in listed]
    findings = _finding("class of the list that no object has", train_set.split, unseen, _UNSEEN)
    for image_set in others:
        counts = class_counts(image_set, names)
        if not counts.any():
            continue
        missing = set(image_set.class_names) - listed
        unlisted = [name for name in names if name in missing]
        here = [(name, count) for name, count, train in zip(names, counts, trained, strict=True) if count and not train]
        only_here = [f"{name}: {count:,} objects" for name, count in here if name not in missing]
        unmeasured = [name for name, count, train in zip(names, counts, trained, strict=True) if train and not count]
        train, where = train_set.split, image_set.split
        findings += _finding(f"class that {train} does not list", where, unlisted, _UNLISTED)
        findings += _finding(f"class that no object of {train} has", where, only_here, _ONLY_HERE.format(train=train))
        advice = _NOT_MEASURED.format(train=train, other=where)
        findings += _finding(f"class of {train} that has no object here", where, unmeasured, advice, is_note=True)
    return findings


def _finding(singular: str, where: str, places: list[str], advice: str, is_note: bool = False) -> list[Finding]:
    kind = (singular, singular.replace("class", "classes", 1).replace("that has", "that have"))
    return findings_at(places, kind, where, advice, is_note)
