"""Problems of a data set, collected while it is read, so that no worker meets them in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.printable import printable

# Kinds, in singular and plural, as the summary prints them.
MISSING_IMAGE = ("missing image skipped", "missing images skipped")
BROKEN_IMAGE = ("unreadable image skipped", "unreadable images skipped")
BROKEN_ANNOTATION = (
    "unusable annotation file, its image skipped",
    "unusable annotation files, their images skipped",
)
NO_ANNOTATION = ("image without an annotation file left out", "images without annotation files left out")
BROKEN_LABEL = ("malformed label dropped", "malformed labels dropped")
NO_BBOX = ("annotation without a bbox dropped", "annotations without a bbox dropped")
UNKNOWN_CLASS = ("label of an unknown class dropped", "labels of unknown classes dropped")
NO_AREA = ("box without area dropped", "boxes without area dropped")
OUTSIDE = ("box outside its image dropped", "boxes outside their images dropped")
CLIPPED = ("box reaching out of its image clipped", "boxes reaching out of their images clipped")
SWAPPED_SIZE = (
    "image annotated with width and height swapped, its own size used",
    "images annotated with width and height swapped, their own sizes used",
)

REPEATED_LINE = ("label line that repeats an earlier one of its file dropped", "repeated label lines dropped")
NO_LABEL_FILE = ("split without any label file", "splits without any label file")
OTHER_SIZE_BOXES = (
    "image annotated with a size that its boxes exceed, its own size used",
    "images annotated with sizes that their boxes exceed, their own sizes used",
)
OTHER_SIZE = (
    "image of another size than annotated, its boxes scaled with it",
    "images of another size than annotated, their boxes scaled with them",
)
LEFT_FOLDER = ("path read that leads out of the data set's folder", "paths read that lead out of the data set's folder")

# What was read in another way than written, without a loss. `NOTES` lists these kinds.
FOUND_ELSEWHERE = ("image found under another path than listed", "images found under other paths than listed")
POLYGON = (
    "polygon or rotated box read as the upright box around it",
    "polygons or rotated boxes read as the upright boxes around them",
)
SIXTH_NUMBER = (
    "label with a sixth number, a score, which is left out",
    "labels with a sixth number, a score, left out",
)
KEYPOINTS = ("label whose keypoints are left out", "labels whose keypoints are left out")
NO_CLASS = (
    "category without objects, the others' supercategory, is no class",
    "categories without objects, the others' supercategories, are no classes",
)
OTHER_FILES = ("kind of file among the images skipped", "kinds of files among the images skipped")
HELD_OUT = ("image held out for validation", "images held out for validation")
NOTES = {FOUND_ELSEWHERE, POLYGON, SIXTH_NUMBER, KEYPOINTS, NO_CLASS, OTHER_FILES, HELD_OUT}

_KEPT = 1000  # places of each kind: as many as anybody would correct by hand
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Problems:
    """Counts and first places of each kind; a place is a file, `file:line` or `file object 3`, maybe with a reason."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, kind: tuple[str, str], place: str) -> None:
        """Count one more of a kind. Control characters in the place, which a terminal would obey, are escaped."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.examples.setdefault(kind, [])
        if len(places) < _KEPT:
            places.append(printable(place))

    def summary(self) -> list[str]:
        """Return a line per kind, such as `2 boxes without area dropped (first: a.xml object 3, b.xml object 1)`."""
        return [self._line(kind) for kind in self.counts]

    def notes(self) -> list[str]:
        """Return the lines of `summary` that are no defects, see `NOTES`."""
        return [self._line(kind) for kind in self.counts if kind in NOTES]

    def _line(self, kind: tuple[str, str]) -> str:
        count = self.counts[kind]
        return f"{count} {kind[count != 1]} (first: {', '.join(self.examples[kind][:_SHOWN])})"

    def lines(self) -> list[str]:
        """Return a line per place, such as `box without area dropped: a.xml object 3`, and how many were not kept."""
        lines = []
        for kind, places in self.examples.items():
            lines += [f"{kind[0]}: {place}" for place in places]
            left_out = self.counts[kind] - len(places)
            if left_out:
                lines.append(f"{kind[0]}: and {left_out} more")
        return lines


def other_size(place: str, annotated_hw: Sequence[int], hw: Sequence[int]) -> str:
    """Describe a place: `a.jpg: annotated as 96x64, the image is 64x96` (height x width)."""
    annotated, own = ("x".join(map(str, each)) for each in (annotated_hw, hw))
    return f"{place}: annotated as {annotated}, the image is {own}"


def usable_boxes(
    boxes: np.ndarray, hws: np.ndarray, places: Sequence[str], problems: Problems
) -> tuple[np.ndarray, np.ndarray]:
    """Clip (M, 4) xyxy boxes to their image. Returns the clipped (M, 4), and (M,) bool: the boxes to keep.

    A box needs 1 px of both sides within the image. hws: (M, 2), of each box's image. places: M of them, for messages.
    """
    clipped = boxes.clip(0, hws[:, [1, 0, 1, 0]].astype(boxes.dtype))
    keep = ((clipped[:, 2:] - clipped[:, :2]) >= 1).all(axis=1)
    had_area = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
    moved = (np.abs(clipped - boxes) > 1).any(axis=1)  # less is rounding
    for row in np.flatnonzero(~keep | moved).tolist():
        if keep[row]:
            problems.add(CLIPPED, places[row])
        else:
            problems.add(OUTSIDE if had_area[row] else NO_AREA, places[row])
    return clipped, keep
