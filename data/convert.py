"""Write a data set in another format: `python -m data.convert FROM TO --to coco`. A page; nothing imports it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import numpy as np

from data.annotation_formats import open_image_set, splits_of
from data.formats.split_names import WHOLE
from data.formats.writers import WRITERS, NamedSet
from data.image_set import ImageSet
from utils.console import say
from utils.errors import UserError
from utils.flags import parse_flags, parse_names, resolve
from utils.image_file import image_hw, lies_on_its_side
from utils.knob import knob
from utils.page import run_page


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """python -m data.convert

    Write a data set in another format, with its splits, file names and boxes; in COCO's also with its ids. YOLO's and
    darknet's labels have no crowds and no difficult objects, so these are left out there.
    """

    data: str = knob(MISSING, "data set to read, as --data of train.py", unit="FROM", positional=True)
    out: str = knob(MISSING, "new folder to write", unit="TO", positional=True)
    to: str = knob(MISSING, "format to write", choices=tuple(WRITERS))
    val_fraction: float = knob(0.0, "of a set without a split 'val', make it of this part", low=0, high=0.9)
    classes: tuple[str, ...] = knob((), "keep these classes only, by name: a,b", unit="NAMES", parse=parse_names)
    copy: bool = knob(False, "copy the images (default: link to them)")


def main(argv: Sequence[str] | None = None) -> None:
    options = resolve(ConvertOptions, parse_flags(ConvertOptions, argv))
    folder = Path(options.out)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder}: already exists; name a new folder")
    sets = [NamedSet.of(each) for each in read_splits(options)]
    WRITERS[options.to](folder, sets, copy_image if options.copy else link_image)
    for each in sets:
        own = each.image_set
        say("wrote", f"{own.split}: {len(own)} images, {len(own.labels)} objects")
        for text in own.problems.summary():
            say("", text)
    print(f"next: python -m data.doctor {folder}")


def read_splits(options: ConvertOptions) -> list[ImageSet]:
    """Read all splits. Raises UserError for one that the format does not have."""
    present = splits_of(options.data) or (WHOLE,)
    if options.val_fraction and "val" not in present:
        present = tuple(dict.fromkeys(["train", "val", *(split for split in present if split != WHOLE)]))
    sets = []
    for split in present:
        image_set = open_image_set(options.data, split, val_fraction=options.val_fraction)
        image_set = image_set.of_classes(options.classes) if options.classes else image_set
        sets.append(image_set if options.to in ("coco", "voc") else for_label_files(image_set))
    return sets


def for_label_files(image_set: ImageSet) -> ImageSet:
    """Return what YOLO and darknet can say: no other splits than train, val and test, and no boxes in an image as it is
    stored, before its EXIF tag turns it. Raises UserError for another split."""
    split = "train" if image_set.split == WHOLE else image_set.split
    if split not in ("train", "val", "test"):
        raise UserError(f"{image_set.source}: split '{split}' has no place in this format; --to coco and voc keep it")
    records = [image_set[index] for index in range(len(image_set))]
    upright = [not lies_on_its_side(image_hw(each.path) or each.hw, each.hw) for each in records]
    if not any(upright):
        raise UserError(f"{image_set.source}: EXIF turns all images of '{split}' after their boxes: --to coco or voc")
    if not all(upright):
        left_out = f"{upright.count(False)} images of {split} are left out: their boxes lie as before EXIF turned them"
        say("", left_out)
    return replace(image_set.subset(np.flatnonzero(upright)), split=split)


def link_image(path: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(os.path.abspath(path))


def copy_image(path: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, place)


if __name__ == "__main__":
    run_page(main)
