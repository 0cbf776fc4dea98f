"""Reader of tables with one box a row: filename,width,height,class,xmin,ymin,xmax,ymax and its like.

Roboflow's <split>/_annotations.csv, <split>.csv, or one .csv; Open Images' has ImageID, LabelName and fractions of the
image. Columns are known by their names, in any order.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.formats.image_finder import ImageFinder, is_image_name
from data.formats.instances import whole_number
from data.formats.split_names import ordered, split_folders, usual_split
from data.formats.written_size import hw_of_annotation
from data.image_set import FoundObject, ImageSet, Record, pack
from data.problems import BROKEN_IMAGE, BROKEN_LABEL, Problems
from utils.errors import UserError
from utils.image_file import SUFFIXES, image_fault, image_hw, is_plausible
from utils.listing import decoded, read_bounded
from utils.printable import printable

EXPECTED = "a .csv of boxes (filename,class,xmin,ymin,xmax,ymax)"

_MOST_BYTES = 1 << 29
_PEEKED = 50  # csv files of a folder that are looked into
_COLUMNS = {
    "file": ("filename", "image", "imageid", "image_id", "image_path", "path", "file", "img", "image_name"),
    "class": ("class", "label", "labelname", "class_name", "name", "category"),
    "xmin": ("xmin", "x1", "x_min", "left"),
    "ymin": ("ymin", "y1", "y_min", "top"),
    "xmax": ("xmax", "x2", "x_max", "right"),
    "ymax": ("ymax", "y2", "y_max", "bottom"),
}
_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A line of a table. texts: by the names of `_COLUMNS`. written_hw: the image's, by columns width and height."""

    line: int
    texts: dict[str, str]
    is_crowd: bool
    written_hw: tuple[int, int] | None


def holds(path: Path) -> bool:
    return path.suffix.lower() == ".csv" if path.is_file() else bool(_files(path))


def splits(path: Path) -> tuple[str, ...]:
    """Return the splits in the names of folders or files; () if one table fits every split."""
    return ordered(_files(path).keys() - {""})


def has_split(path: Path, split: str) -> bool:
    files = _files(path)
    return split in files or "" in files


def read(path: Path, split: str) -> ImageSet:
    """Read a split. Class names are sorted over all tables, so that all splits have the same labels.

    An image id is the number of the image's first row among the images, from 1. A row without a class and a box lists
    an image without objects; what Open Images calls a group is a crowd. Raises UserError for a table that is none.
    """
    files = _files(path)
    file = files.get(split, files.get("", path))
    root = path if path.is_dir() else path.parent
    names = sorted({row.texts["class"] for each in files.values() for row in _rows(each)} - {""})
    label_of = {name: label for label, name in enumerate(names)}
    problems = Problems()
    rows_of: dict[str, list[_Row]] = {}
    for row in _rows(file):
        rows_of.setdefault(row.texts["file"], []).append(row)
    folders = [file.parent, *(file.parent / name for name in ("images", split, file.stem)), root / "images"]
    finder = ImageFinder(folders, problems, root)
    records = []
    for image_id, (name, rows) in enumerate(rows_of.items(), start=1):
        image = _image(finder, name)
        hw = None if image is None else image_hw(str(image))
        if image is not None and hw is None:
            problems.add(BROKEN_IMAGE, image_fault(str(image)))
        elif image is not None and hw is not None:
            place = f"{file}:{rows[0].line}"
            hw = hw_of_annotation(str(image), hw, rows[0].written_hw, place, problems)
            objects = [found for row in rows if (found := _object(row, file, hw, label_of, problems))]
            records.append(Record.of_objects(image, image_id, hw, objects))
    return pack(
        records,
        name=os.path.basename(os.path.abspath(root)),
        split=split,
        class_names=names,
        category_ids=range(1, len(names) + 1),
        problems=problems,
        source=str(file),
    )


def _files(path: Path) -> dict[str, Path]:
    """Return split -> its table; "" -> the only one, if no split is in its name."""
    if path.is_file():
        return {"": path}
    tables = {split: _lone_table(folder) for split, folder in split_folders(path).items()}
    if found := {split: file for split, file in tables.items() if file is not None}:
        return found
    named = {usual_split(file.stem) or "": file for file in _tables(path)}
    return named if len(named) < 2 or "" not in named else {split: file for split, file in named.items() if split}


def _lone_table(folder: Path) -> Path | None:
    files = list(_tables(folder))
    return files[0] if len(files) == 1 else None


def _tables(folder: Path) -> Iterator[Path]:
    for file in islice(sorted(folder.glob("*.csv")), _PEEKED):
        if file.is_file():
            with open(file, "rb") as stream:
                header = stream.readline(4096).decode("utf-8-sig", "replace")
            if None not in _places(header.strip().split(",")).values():
                yield file


def _places(header: list[str]) -> dict[str, int | None]:
    """Return the index of each of our columns; None for one that is not there."""
    names = [name.strip().strip('"').lower() for name in header]
    found = {column: [names.index(name) for name in known if name in names] for column, known in _COLUMNS.items()}
    return {column: at[0] if at else None for column, at in found.items()}


def _rows(file: Path) -> Iterator[_Row]:
    """Yield the rows of a table. Raises UserError if it has no such columns or is no text."""
    try:
        lines = decoded(read_bounded(file, _MOST_BYTES)).splitlines()
        reader = csv.reader(lines)
        header = next(reader, [])
        places = _places(header)
        if lacks := [column for column, place in places.items() if place is None]:
            found = printable(", ".join(header)[:200]) or "nothing"
            raise UserError(f"{file}:1: expected the columns {', '.join(_COLUMNS)}, found {found}: no {lacks[0]}.")
        named = {name.strip().lower(): at for at, name in enumerate(header)}
        group = named.get("isgroupof")
        sides = [named.get(side, len(header)) for side in ("height", "width")]
        for cells in reader:
            texts = {
                name: cells[at].strip() if at is not None and at < len(cells) else "" for name, at in places.items()
            }
            if texts["file"]:
                texts["class"] = printable(texts["class"])
                is_crowd = group is not None and cells[group : group + 1] == ["1"]
                height, width = (whole_number("".join(cells[at : at + 1])) for at in sides)
                hw = (height, width) if height and width and is_plausible((height, width)) else None
                yield _Row(line=reader.line_num, texts=texts, is_crowd=is_crowd, written_hw=hw)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a table ({error}).") from error


def _image(finder: ImageFinder, name: str) -> Path | None:
    """Find the image; a name without an ending, such as Open Images' ids, has one of an image."""
    if not is_image_name(name):
        for folder in finder.folders:
            for suffix in SUFFIXES:
                if finder.listings.has(os.path.join(folder, name + suffix)):
                    return Path(folder, name + suffix)
    return finder.find(name)


def _object(
    row: _Row, file: Path, hw: tuple[int, int], label_of: dict[str, int], problems: Problems
) -> FoundObject | None:
    texts, place = [row.texts[side] for side in _SIDES], f"{file}:{row.line}"
    if not any((*texts, row.texts["class"])):
        return None
    try:
        box = [float(text) for text in texts]
    except ValueError:
        box = []
    if not box or not all(map(math.isfinite, box)) or not row.texts["class"]:
        shown = ", ".join(f"{name}={text[:20]!r}" for name, text in row.texts.items() if name != "file")
        problems.add(BROKEN_LABEL, f"{place}: expected a class and four numbers, found {shown}")
        return None
    if max(box) <= 1:  # fractions, as in Open Images; no box of pixels is that small
        height, width = hw
        box = [side * scale for side, scale in zip(box, (width, height, width, height), strict=True)]
    return FoundObject(box, label_of[row.texts["class"]], row.is_crowd, place)
