"""Reader of darknet's format: a .data file that names lists of images, with one .txt of normalized boxes per image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data.formats.image_finder import ImageFinder, find_path, images_below, note_if_outside
from data.formats.label_files import LabelFiles
from data.image_set import ImageSet, pack
from data.problems import Problems
from utils.errors import UserError
from utils.listing import read_lines

EXPECTED = "a darknet .data file"

_KEYS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
_MOST_CLASSES = 100_000  # a cfg allows fewer


def holds(path: Path) -> bool:
    return path.suffix == ".data" if path.is_file() else len(list(path.glob("*.data"))) == 1


def splits(path: Path) -> tuple[str, ...]:
    """Return the splits with a list of images. Raises UserError if there are none."""
    file = _data_file(path)
    settings = _settings(file)
    listed = tuple(split for split in _KEYS if _listed_by(settings, split))
    if not listed:
        raise UserError(f"{file}: names no list of images: expected 'train = FILE', 'valid = FILE' or 'test = FILE'.")
    return listed


def has_split(path: Path, split: str) -> bool:
    return split in splits(path)


def read(path: Path, split: str) -> ImageSet:
    """Read a split. An image without a label file has no objects; an image id is the number of its line, from 1.

    Raises UserError if the .data file is incomplete or no listed image is usable.
    """
    file = _data_file(path)
    settings = _settings(file)
    names_file = _find_file(settings["names"], file) if "names" in settings else None
    class_names = _class_names(file, settings, names_file)
    source = _find_file(_listed_by(settings, split), file)
    problems = Problems()
    note_if_outside(source, [file.parent], problems)
    images = listed_images([source], [file.parent, source.parent, file.parent.parent, Path()], file.parent, problems)
    return pack(
        LabelFiles(class_names, problems).records(images),
        name=file.stem,
        split=split,
        class_names=class_names,
        category_ids=range(len(class_names)),
        problems=problems,
        source=str(source),
        classes_source=str(names_file or file),
    )


def listed_images(
    sources: Sequence[Path], folders: Sequence[Path], root: Path, problems: Problems
) -> list[tuple[int, Path]]:
    """Return (id, path) of the images of lists and folders; an id is the number of its line, from 1.

    folders: what paths in lists are relative to. root: the data set's folder.
    """
    finder = ImageFinder(folders, problems, root)
    found: list[Path | None] = []
    for source in sources:
        found += images_below(source, problems) if source.is_dir() else map(finder.find, read_lines(source))
    return [(number, image) for number, image in enumerate(found, start=1) if image is not None]


def _data_file(path: Path) -> Path:
    return path if path.is_file() else next(path.glob("*.data"))


def _settings(file: Path) -> dict[str, str]:
    """Parse the `key = value` lines; # and ; start a comment, and quotes around a value are left out."""
    lines = [line for line in read_lines(file) if line[0] not in "#;"]
    pairs = (re.split(r"\s[#;]", line)[0].partition("=") for line in lines)
    return {key.strip(): value.strip().strip("\"'") for key, equals, value in pairs if equals}


def _listed_by(settings: dict[str, str], split: str) -> str:
    return next((settings[key] for key in _KEYS[split] if settings.get(key)), "")


def _class_names(file: Path, settings: dict[str, str], names_file: Path | None) -> list[str]:
    """Read the `names` file; without one, name classes as for .weights without names (`models.weights.trained`)."""
    names = None if names_file is None else read_lines(names_file)
    if "classes" not in settings and names:
        return names
    classes = settings.get("classes", "")
    if not classes.isdecimal() or not 0 < int(classes[:7]) <= _MOST_CLASSES:
        raise UserError(f"{file}: expected 'classes = N', the number of classes, or a 'names' file.")
    if names is not None and len(names) != int(classes):
        raise UserError(
            f"{file}: classes = {classes}, but {settings['names']} has {len(names)} names: correct one of them."
        )
    return names or [f"class {label}" for label in range(int(classes))]


def _find_file(value: str, file: Path) -> Path:
    """Resolve a path in a .data file against its folder, the folder above, or the current one."""
    found = find_path(value, (file.parent, file.parent.parent, Path()))
    if found is None:
        raise UserError(f"{file}: names the file {value[:200]}, which does not exist.")
    return found
