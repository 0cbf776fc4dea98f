"""Which annotation format a path holds, found out by looking."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from data import coco, darknet, voc
from data.digits import ensure_digits
from data.image_set import ImageSet
from utils.errors import UserError

BUILT_IN = "digits"
_BUILT_IN_FOLDER = Path("datasets") / BUILT_IN
_FORMATS = (coco, voc, darknet)
_EXPECTED = (
    "a COCO folder (annotations/instances_<split>.json), a COCO .json file, "
    "a VOC folder (Annotations, JPEGImages, ImageSets/Main) or a darknet .data file"
)


def open_image_set(path: str | Path, split: str) -> ImageSet:
    """The split of the data set at `path`; 'digits' is the built-in one, made under datasets/ on first use.

    Raises UserError if the path, its format, the split or every image of it is no good.
    """
    path, found = _recognised(path)
    if not found.has_split(path, split):
        raise UserError(f"{path}: has no split '{split}'; it has {', '.join(found.splits(path)) or 'none'}.")
    with _without_collection():
        return found.read(path, split)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Python's garbage collector would look again and again through a large set's millions of objects, in vain."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def splits_of(path: str | Path) -> tuple[str, ...]:
    """The usual ones that `open_image_set` would open; () for a COCO json that stands for any. Raises UserError."""
    path, found = _recognised(path)
    return found.splits(path)


def _recognised(path: str | Path) -> tuple[Path, ModuleType]:
    """The data set's place and the module that reads its format."""
    # Unlike Path's, os.path's leaves the ~ of an unknown user as it is.
    path = ensure_digits(_BUILT_IN_FOLDER) if str(path) == BUILT_IN else Path(os.path.expanduser(path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected {_EXPECTED}.")
    found = next((each for each in _FORMATS if each.holds(path)), None)
    if found is None:
        raise UserError(f"{path}: holds no known data set; expected {_EXPECTED}.")
    return path, found
