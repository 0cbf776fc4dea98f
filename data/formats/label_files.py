"""YOLO's label files: one .txt per image, one object per line, in fractions of the image's width and height."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.formats.image_finder import Listings
from data.image_set import FoundObject, Record
from data.problems import (
    BROKEN_IMAGE,
    BROKEN_LABEL,
    KEYPOINTS,
    NO_LABEL_FILE,
    POLYGON,
    REPEATED_LINE,
    SIXTH_NUMBER,
    UNKNOWN_CLASS,
    Problems,
)
from utils.errors import UserError
from utils.image_file import image_fault, image_hw
from utils.listing import decoded, read_bounded

_MOST_BYTES = 1 << 22  # some 100,000 lines
_FARTHEST = 2  # a box's centre in fractions; far outside the image, it is in pixels
_IMAGE_FOLDERS = ("images", "JPEGImages")


class LabelFiles:
    """Reads the objects of images; collects problems.

    keypoints: whether lines are `class x y w h` and then keypoints, not polygons.
    """

    def __init__(self, class_names: Sequence[str], problems: Problems, *, keypoints: bool = False) -> None:
        self.class_names, self.problems, self.keypoints = class_names, problems, keypoints
        self.listings = Listings()
        self._from_one = dict.fromkeys(range(len(class_names) + 1), 0)  # objects by class as it is written

    def records(self, images: Iterable[tuple[int, Path]]) -> list[Record]:
        """Read images, given with their ids; one without a label file has no objects.

        Raises UserError if the classes are counted from 1.
        """
        records, searched, any_file = [], "", False
        for image_id, image in images:
            labels = self.label_file(image)
            any_file |= labels is not None
            searched = searched or " or ".join(_candidates(str(image)))
            hw = image_hw(str(image))
            if hw is None:
                self.problems.add(BROKEN_IMAGE, image_fault(str(image)))
                continue
            objects = [] if labels is None else self.objects(labels, hw)
            records.append(Record.of_objects(image, image_id, hw, objects))
        if records and not any_file:
            self.problems.add(NO_LABEL_FILE, f"expected {searched}, found none")
        self._check_first_class(records[0].path if records else "")
        return records

    def label_file(self, image: Path) -> Path | None:
        """Return the label file: .../labels/... .txt for .../images/... or .../JPEGImages/..., else beside the image.

        None if neither exists. Source: darknet, `utils.c`, replace_image_to_label.
        """
        found = next(filter(self.listings.has, _candidates(str(image))), None)
        return None if found is None else Path(found)

    def objects(self, labels: Path, hw: tuple[int, int]) -> list[FoundObject]:
        """Return a label file's objects, boxes xyxy in pixels of an image of this size."""
        try:
            text = decoded(read_bounded(labels, _MOST_BYTES), errors="replace")
        except UserError as error:
            self.problems.add(BROKEN_LABEL, str(error))
            return []
        (height, width), objects, seen = hw, [], set()
        for number, line in enumerate(text.splitlines(), start=1):
            values = line.split()
            if not values:
                continue
            place = f"{labels}:{number}"
            row = self._row(values, place)
            if row is None:
                continue
            if row in seen:
                self.problems.add(REPEATED_LINE, place)
                continue
            seen.add(row)
            label, x, y, w, h = row
            box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            objects.append(FoundObject(box, int(label), False, place))
        return objects

    def _row(self, values: list[str], place: str) -> tuple[float, ...] | None:
        """Return class, x, y, w, h; None, and a problem, for a line that is malformed or of an unknown class."""
        row = _numbers(values)
        box = f"expected 'class x y w h', found {_shown(values)}" if row is None else self._box(row[1:], place)
        if isinstance(box, str):
            self.problems.add(BROKEN_LABEL, f"{place}: {box}")
            return None
        assert row is not None
        if int(row[0]) in self._from_one:
            self._from_one[int(row[0])] += 1
        if not 0 <= row[0] < len(self.class_names):
            what = f"{place} names class {row[0]:.0f} of {len(self.class_names)}"
            self.problems.add(UNKNOWN_CLASS, what)
            return None
        if max(box[:2]) >= _FARTHEST:
            pixels = f"expected fractions of the image, from 0 to 1, found {_shown(values)}: pixels?"
            self.problems.add(BROKEN_LABEL, f"{place}: {pixels}")
            return None
        return row[0], *box

    def _box(self, numbers: list[float], place: str) -> tuple[float, ...] | str:
        """Return x, y, w, h of what follows the class, or what is wrong with it."""
        if len(numbers) > 5 and self.keypoints:
            self.problems.add(KEYPOINTS, place)
            return tuple(numbers[:4])
        if len(numbers) == 5:
            self.problems.add(SIXTH_NUMBER, place)
            return tuple(numbers[:4])
        if len(numbers) >= 6 and len(numbers) % 2 == 0:
            self.problems.add(POLYGON, place)
            left, right = min(numbers[::2]), max(numbers[::2])
            top, bottom = min(numbers[1::2]), max(numbers[1::2])
            return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
        if len(numbers) != 4:
            return f"expected 'class x y w h', found {len(numbers) + 1} numbers"
        return tuple(numbers)

    def _check_first_class(self, example: str) -> None:
        """Raise UserError if objects are of the classes 1 to C, where 0 to C - 1 are expected."""
        last, total = len(self.class_names), sum(self._from_one.values())
        if self._from_one[0] == 0 and self._from_one[last] > total / 20:
            raise UserError(
                f"{self.label_file(Path(example)) or example}: expected classes from 0 to {last - 1}, found 1 to {last}"
                " and no 0 in this split: they seem to be counted from 1; subtract 1 in all label files, or put a name "
                "for class 0 in front of the others."
            )


def _candidates(image: str) -> list[str]:
    """Return where an image's label file may be, the likeliest first."""
    stem = os.path.splitext(image)[0]
    parts = stem.split(os.sep)
    for depth in range(len(parts) - 2, -1, -1):
        if parts[depth] in _IMAGE_FOLDERS:
            return [os.sep.join([*parts[:depth], "labels", *parts[depth + 1 :]]) + ".txt", stem + ".txt"]
    return [stem + ".txt"]


def _numbers(values: list[str]) -> list[float] | None:
    """Return the line's numbers; None unless all are finite and the class is an integer."""
    try:
        row = [float(value) for value in values]
    except ValueError:
        return None
    return row if all(map(math.isfinite, row)) and row[0].is_integer() else None


def _shown(values: list[str]) -> str:
    """Return the beginning of a line, with what may be the reason that it is none of numbers."""
    text = " ".join(values)
    hint = ""
    if "," in text:
        hint = " (write decimal points, and blanks between the numbers)"
    elif not values[0].replace(".", "").isdigit() and _numbers(["0", *values[1:]]) is not None:
        hint = " (expected the class's number, from 0)"
    return f"'{text[:60]}'{hint}"
