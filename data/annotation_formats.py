"""Opening a data set in whichever annotation format its path holds.

To add a format, write one module with the names of `AnnotationFormat`, as voc.py is one, and add it to `_FORMATS`.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Protocol

from data import coco, darknet, voc
from data.digits import make_digits
from data.image_set import ImageSet
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
        """Return the names of the usual splits; () if the one list of images fits every split."""

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
)

BUILT_IN = "digits"
_BUILT_IN_FOLDER = Path("datasets") / BUILT_IN


def open_image_set(path: str | Path, split: str) -> ImageSet:
    """Read a split of the data set at `path`; 'digits' is the built-in one, made under datasets/ on first use.

    Raises UserError if the path, its format, the split or every image of it is unusable.
    """
    path, reader = _recognized(path)
    if not reader.has_split(path, split):
        raise UserError(f"{path}: has no split '{split}'; it has {', '.join(reader.splits(path)) or 'none'}.")
    collects = gc.isenabled()
    gc.disable()  # it would scan a large set's millions of objects repeatedly, in vain
    try:
        return reader.read(path, split)
    finally:
        if collects:
            gc.enable()


def splits_of(path: str | Path) -> tuple[str, ...]:
    """Return the usual splits of a data set; () for a COCO json that fits every split. Raises UserError."""
    path, reader = _recognized(path)
    return reader.splits(path)


def _recognized(path: str | Path) -> tuple[Path, AnnotationFormat]:
    """Return the data set's path and the reader of its format."""
    # os.path's expanduser, unlike Path's, leaves the ~ of an unknown user as it is.
    path = make_digits(_BUILT_IN_FOLDER) if str(path) == BUILT_IN else Path(os.path.expanduser(path))
    *most, last = (each.EXPECTED for each in _FORMATS)
    expected = f"expected {', '.join(most)} or {last}"
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {expected}.")
    reader = next((each for each in _FORMATS if each.holds(path)), None)
    if reader is None:
        raise UserError(f"{path}: holds no known data set; {expected}.")
    return path, reader
