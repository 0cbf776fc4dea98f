"""Opening a data set in whichever annotation format its path holds.

To add a format, write one module in data/formats with the names of `AnnotationFormat`, as voc.py is one, and add it to
`_FORMATS`.
"""

from __future__ import annotations

import difflib
import gc
import os
from collections import Counter
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from data.digits import make_digits
from data.formats import boxes_csv, coco, darknet, voc, yolo
from data.formats.split_names import WHOLE
from data.image_set import ImageSet
from data.problems import HELD_OUT
from utils.errors import UserError


class AnnotationFormat(Protocol):
    """A module that reads one annotation format.

    `splits`, `has_split` and `read` are called only with a path that `holds` accepts.
    """

    EXPECTED: str
    """What a path in this format is, for error messages: "a darknet .data file"."""

    def holds(self, path: Path, /) -> bool:
        """Return whether an existing file or folder is in this format. Cheap: reads names, not annotations."""

    def splits(self, path: Path, /) -> tuple[str, ...]:
        """Return the names of the usual splits; () if the one list of images fits every split.

        `split_names.WHOLE` alone, if the images are there and nothing divides them.
        """

    def has_split(self, path: Path, split: str, /) -> bool:
        """Return whether `read` finds the split; it may accept more names than `splits` lists."""

    def read(self, path: Path, split: str, /) -> ImageSet:
        """Read a split: `image_set.pack` its Records, with boxes xyxy in pixels of the image.

        Unusable objects and images become `problems.Problems`; an unusable file is a UserError.
        """


# The first that `holds` a path reads it.
_FORMATS: tuple[AnnotationFormat, ...] = (
    coco,
    voc,
    darknet,
    yolo,
    boxes_csv,
)

_LOOKED_INTO = 50  # folders in a folder without a data set

BUILT_IN = "digits"
_BUILT_IN_FOLDER = Path("datasets") / BUILT_IN


def open_image_set(path: str | Path, split: str, *, val_fraction: float = 0) -> ImageSet:
    """Read a split of the data set at `path`; 'digits' is the built-in one, made under datasets/ on first use.

    val_fraction: of a set without a split 'val', this part of its images is 'val', and the others are 'train'.
    Raises UserError if the path, its format, the split or every image of it is unusable.
    """
    path, reader = _recognized(path)
    there = reader.splits(path)
    # What a validation split can be taken from: the images that nothing divides, or the training split.
    pool = WHOLE if there == (WHOLE,) else "train"
    is_divisible = split in ("train", "val") and "val" not in there and reader.has_split(path, pool)
    if val_fraction and is_divisible:
        return hold_out(_read(reader, path, pool), split, val_fraction)
    if not reader.has_split(path, split):
        lacks = f"has no split '{split}'; it has {', '.join(there) or 'none'}."
        if there == (WHOLE,):
            lacks = (
                f"nothing divides its images into splits, so there is no '{split}'; the split '{WHOLE}' is all of them."
            )
        hint = " --val-fraction 0.1 holds out a tenth of its images for validation." if is_divisible else ""
        raise UserError(f"{path}: {lacks}{hint}")
    return _read(reader, path, split)


def splits_of(path: str | Path) -> tuple[str, ...]:
    """Return the usual splits of a data set; () for a COCO json that fits every split. Raises UserError."""
    path, reader = _recognized(path)
    return reader.splits(path)


def _read(reader: AnnotationFormat, path: Path, split: str) -> ImageSet:
    collects = gc.isenabled()
    gc.disable()  # it would scan a large set's millions of objects repeatedly, in vain
    try:
        return reader.read(path, split)
    finally:
        if collects:
            gc.enable()


def hold_out(image_set: ImageSet, split: str, val_fraction: float) -> ImageSet:
    """Return the held-out images, or the others. A hash of its name decides about an image, wherever the set lies.

    So it hardly changes sides when others are added. Augmented copies that Roboflow made of one image, as
    a_jpg.rf.HASH.jpg, are on one side together. Raises UserError if there are too few.
    """
    count = len(image_set)
    names = [os.path.basename(path) for path in image_set.paths.tolist()]
    if len(set(sources := [name.partition(b".rf.")[0] for name in names])) == len(set(names)):
        sources = names  # no copies
    keys = [blake2b(source, digest_size=8).digest() for source in sources]
    order = sorted(range(count), key=lambda index: (keys[index], index))
    held_out = max(1, round(val_fraction * count))
    while sources is not names and held_out < count and keys[order[held_out]] == keys[order[held_out - 1]]:
        held_out += 1
    if held_out >= count:
        raise UserError(f"{image_set.name}: its {count} images cannot be divided for a validation: add images.")
    chosen = sorted(order[:held_out] if split == "val" else order[held_out:])
    for index in chosen if split == "val" else ():
        image_set.problems.add(HELD_OUT, os.path.basename(os.fsdecode(image_set.paths[index])))
    return replace(image_set.subset(chosen), split=split)


def _recognized(path: str | Path) -> tuple[Path, AnnotationFormat]:
    """Return the data set's path and the reader of its format."""
    # os.path's expanduser, unlike Path's, leaves the ~ of an unknown user as it is.
    path = make_digits(_BUILT_IN_FOLDER) if str(path) == BUILT_IN else Path(os.path.expanduser(path))
    *most, last = (each.EXPECTED for each in _FORMATS)
    expected = f"expected {', '.join(most)} or {last}"
    if not path.exists():
        raise UserError(f"{path}: no such file or folder{_near(path)}; {expected}.")
    reader = next((each for each in _FORMATS if each.holds(path)), None)
    if reader is None:
        raise UserError(f"{path}: holds no known data set{_inside(path)}; {expected}.")
    return path, reader


def _near(path: Path) -> str:
    """Return a hint at a name that differs in its case, or by a letter."""
    names = {each.name.casefold(): each.name for each in path.parent.glob("*")} if path.parent.is_dir() else {}
    close = difflib.get_close_matches(path.name.casefold(), names, n=1, cutoff=0.8)
    return f" (there is {path.parent / names[close[0]]})" if close else ""


def _inside(path: Path) -> str:
    """Return a hint at a data set in a folder of this folder, or else at what is there."""
    if not path.is_dir():
        return ""
    entries = sorted(path.iterdir())
    for folder in entries[:_LOOKED_INTO]:
        if folder.is_dir() and any(each.holds(folder) for each in _FORMATS):
            return f", but {folder} does: --data {folder}"
    endings = Counter(each.suffix.lower() or "no ending" for each in entries if each.is_file())
    counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
    return f" ({counts} and {sum(each.is_dir() for each in entries)} folders)" if entries else " (the folder is empty)"
