"""One thing that the owner of a data set should know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap

from data.image_set import ImageSet
from utils.printable import printable

_SHOWN_IN_A_LINE = 3
_COLUMNS = 110


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A defect, or a note (is_note), about one split or two (where).

    kind: what was found, in singular and plural, as it follows the count. advice: what it means for training and what
    to do. places: where it was found, maybe fewer than `count`.
    """

    kind: tuple[str, str]
    where: str
    count: int
    advice: str
    places: tuple[str, ...] = ()
    is_note: bool = False

    @property
    def title(self) -> str:
        """The first line, such as `train: 2 boxes without area dropped`."""
        return f"{self.where}: {self.count:,} {self.kind[self.count != 1]}"

    def line(self) -> str:
        """Return what fits into a line: `train: 2 boxes without area dropped (first: a.xml object 3, ...)`."""
        first = ", ".join(self.places[:_SHOWN_IN_A_LINE])
        return f"{self.title} (first: {first})" if first else self.title

    def lines(self, most: int | None = None) -> Iterator[str]:
        """Yield a paragraph: the title, the advice, and a line for each place, or for the first `most` of them."""
        yield self.title
        yield from wrap(self.advice, _COLUMNS, initial_indent="    ", subsequent_indent="    ")
        shown = self.places[:most]
        yield from (f"      {place}" for place in shown)
        left_out = self.count - len(shown)
        if shown and left_out:
            yield f"      and {left_out:,} more"


def findings_at(
    places: Sequence[str], kind: tuple[str, str], where: str, advice: str, is_note: bool = False
) -> list[Finding]:
    """Return the Finding of these places, if there are any. Their control characters are escaped."""
    count, shown = len(places), tuple(map(printable, places))
    return [Finding(kind=kind, where=where, count=count, advice=advice, places=shown, is_note=is_note)] if count else []


def described(image_set: ImageSet, image: int, item: int) -> str:
    """Describe an object: `a.png: dog, 10,20 to 30,40` (its corners, as trained on, in source pixels)."""
    left, top, right, bottom = (f"{value:g}" for value in image_set.boxes[item].round(1).tolist())
    name = image_set.class_names[image_set.labels[item]]
    return f"{image_set[image].path}: {name}, {left},{top} to {right},{bottom}"
