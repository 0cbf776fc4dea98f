"""Lines that a page prints for the user: a column of labels, then the text.

Names in them are strangers': control characters, which a terminal would obey, are escaped.
"""

from __future__ import annotations

from utils import ranks
from utils.printable import printable


def line(label: str, text: str) -> str:
    """Return "label     text" with the text from the eleventh column on; an empty label continues the line above."""
    return f"{label:<10}{text}"


def counted(count: int, noun: str) -> str:
    """Return "1 image", "2 images", "3 classes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural * (count != 1)}"


def say(label: str, text: str) -> None:
    """Print `line(label, text)` on rank 0."""
    if ranks.is_rank_zero():
        print(printable(line(label, text)))


def warn(text: str) -> None:
    """Print a warning on rank 0."""
    if ranks.is_rank_zero():
        print(f"warning: {printable(text)}")
