"""Where the files are that an annotation names, maybe as another machine or another hand wrote their paths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

from data.problems import FOUND_ELSEWHERE, LEFT_FOLDER, MISSING_IMAGE, OTHER_FILES, Problems
from utils.image_file import SUFFIXES

_NOTES = {".txt", ".xml", ".json", ".yaml", ".yml", ".csv", ".md", ".cache", ".names", ".data"}


def spellings(written: str) -> Iterator[str]:
    """Yield readings of a path: as written; then with slashes, without quotes, and without its leading folders one by
    one, as `..`, a drive, `data/` of CVAT or the folders of another machine."""
    yield written
    parts = [part for part in written.strip("\"'").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if "%" in written or "://" in written:
        parts = unquote("/".join(parts)).split("/")
    for dropped in range(len(parts)):
        yield "/".join(parts[dropped:])


class Listings:
    """The names of regular files by folder; each folder is listed once, which is faster than a question per file."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}
        self._folded: dict[str, dict[str, str]] = {}

    def names(self, folder: str) -> frozenset[str]:
        """Return the names in a folder; none if there is no such folder."""
        if folder not in self._names:
            try:
                with os.scandir(folder or ".") as entries:
                    self._names[folder] = frozenset(entry.name for entry in entries if entry.is_file())
            except (OSError, ValueError):  # ValueError: a NUL in the name
                self._names[folder] = frozenset()
        return self._names[folder]

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self.names(folder)

    def in_other_case(self, path: str) -> str | None:
        """Return the file with the same name in another letter case."""
        folder, name = os.path.split(path)
        if folder not in self._folded:
            self._folded[folder] = {each.casefold(): each for each in sorted(self.names(folder), reverse=True)}
        found = self._folded[folder].get(name.casefold())
        return None if found is None else os.path.join(folder, found)


class ImageFinder:
    """Finds listed images in `folders`, the likeliest first, and adds a problem for each that is not there.

    root: the data set's folder. A path that leaves it by `..` is read and reported.
    """

    def __init__(self, folders: Iterable[Path], problems: Problems, root: Path) -> None:
        self.folders = list(dict.fromkeys(str(folder) for folder in folders))
        self.problems, self.listings = problems, Listings()
        self._root = root
        self._listed_as: dict[str, str] = {}  # of those found elsewhere than listed

    def find(self, written: str, *, place: str | None = None) -> Path | None:
        """Return the image's path, or None and a problem. place: how to call it in messages."""
        found = self._exact(written) or self._elsewhere(written)
        if found is None:
            self.problems.add(MISSING_IMAGE, (place or written) + self._near_miss(written))
            return None
        note_if_outside(Path(found), [self._root], self.problems)
        return Path(found)

    def _exact(self, written: str) -> str | None:
        paths = (os.path.join(folder, written) for folder in self.folders)
        return next((path for path in paths if self.listings.has(path)), None)

    def _elsewhere(self, written: str) -> str | None:
        """Find the file under another spelling or in another case; of two names that lead to one file, the first."""
        for spelling in spellings(written):
            for path in (os.path.join(folder, spelling) for folder in self.folders):
                found = path if self.listings.has(path) else self.listings.in_other_case(path)
                if found is not None and self._listed_as.setdefault(found, written) == written:
                    self.problems.add(FOUND_ELSEWHERE, f"{written} is {found}")
                    return found
        return None

    def _near_miss(self, written: str) -> str:
        """Return a hint at an image of that name with another ending, in the folder or one above."""
        *_, name = spellings(written)
        stem, own = os.path.splitext(name)
        up = [os.path.dirname(folder) for folder in self.folders]
        for folder in dict.fromkeys([os.path.join(f, os.path.dirname(written)) for f in self.folders] + up):
            for suffix in (own, *SUFFIXES):
                for path in (os.path.join(folder, stem + suffix), os.path.join(folder, stem + suffix.upper())):
                    if self.listings.has(path):
                        return f" (there is {path})"
        return ""


def note_if_outside(path: Path, roots: Iterable[Path], problems: Problems) -> None:
    """Add a problem if the path leads out of all these folders by `..`."""
    if ".." in path.parts:
        real = os.path.realpath(path)
        if not any(real.startswith(os.path.join(os.path.realpath(root), "")) for root in roots):
            problems.add(LEFT_FOLDER, str(path))


def find_path(written: str, folders: Iterable[Path]) -> Path | None:
    """Return the file or folder that `written` means, searched in `folders`; None if there is none."""
    for spelling in spellings(written):
        for folder in folders:
            path = folder / spelling
            if spelling and (os.path.isfile(path) or os.path.isdir(path)):  # False for what can be no name
                return path
    return None


def images_below(folder: Path, problems: Problems) -> list[Path]:
    """Return the images in a folder and its sub-folders, sorted. Hidden files and folders are left out.

    Other files than annotations are noted by their endings.
    """
    found, others, walked = [], Counter[str](), set[str]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in walked:  # by a link, which may lead to a folder that it is in
            folders.clear()
            continue
        walked.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        images = [name for name in names if is_image_name(name)]
        found += [os.path.join(parent, name) for name in images]
        if len(images) < len(names):
            others.update(os.path.splitext(name)[1].lower() for name in set(names) - set(images) if name[0] != ".")
    for ending, count in sorted(others.items()):
        if ending not in _NOTES:
            problems.add(OTHER_FILES, f"{count} {ending or 'without ending'}")
    return [Path(path) for path in sorted(found)]


def is_image_name(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES
