"""Reader of darknet's format: a .data file that names lists of images, with one .txt of normalized boxes per image."""

from __future__ import annotations

import math
from pathlib import Path

from data.image_file import image_hw
from data.image_set import FoundObject, ImageSet, Record, pack
from data.problems import BROKEN_IMAGE, BROKEN_LABEL, MISSING_IMAGE, UNKNOWN_CLASS, Problems
from utils.errors import UserError
from utils.listing import read_lines

EXPECTED = "a darknet .data file"

_KEYS = {"train": "train", "val": "valid", "test": "test"}


def holds(path: Path) -> bool:
    return path.suffix == ".data" if path.is_file() else len(list(path.glob("*.data"))) == 1


def splits(path: Path) -> tuple[str, ...]:
    """Return the splits with a list of images. Raises UserError if there are none."""
    file = _data_file(path)
    keys = _settings(file)
    listed = tuple(split for split, key in _KEYS.items() if key in keys)
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
    list_file = _find_file(settings[_KEYS[split]], file)
    problems, records = Problems(), []
    folders = [file.parent, list_file.parent, file.parent.parent, Path()]
    for image_id, line in enumerate(read_lines(list_file), start=1):
        image = next((folder / line for folder in folders if (folder / line).is_file()), None)
        if image is None:
            problems.add(MISSING_IMAGE, line)
            continue
        hw = image_hw(str(image))
        if hw is None:
            problems.add(BROKEN_IMAGE, line)
            continue
        records.append(_record(image, image_id, hw, len(class_names), problems))
    return pack(
        records,
        name=file.stem,
        split=split,
        class_names=class_names,
        category_ids=range(len(class_names)),
        problems=problems,
        source=str(list_file),
        classes_source=str(names_file or file),
    )


def label_file(image: Path) -> Path | None:
    """Return the label file: .../labels/... .txt for .../images/... or .../JPEGImages/..., else beside the image.

    None if neither exists. Source: darknet, `utils.c`, replace_image_to_label.
    """
    candidates = [image.with_suffix(".txt")]
    for depth in range(len(image.parts) - 2, -1, -1):
        if image.parts[depth] in ("images", "JPEGImages"):
            labels = Path(*image.parts[:depth], "labels", *image.parts[depth + 1 :])
            candidates.insert(0, labels.with_suffix(".txt"))
            break
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _data_file(path: Path) -> Path:
    return path if path.is_file() else next(path.glob("*.data"))


def _settings(file: Path) -> dict[str, str]:
    """Parse the `key = value` lines; # and ; start a comment."""
    lines = [line for line in read_lines(file) if line[0] not in "#;"]
    pairs = (line.partition("=") for line in lines)
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def _class_names(file: Path, settings: dict[str, str], names_file: Path | None) -> list[str]:
    """Read the `names` file; without one, name classes as for .weights without names (`models.weights.trained`)."""
    names = None if names_file is None else read_lines(names_file)
    if "classes" not in settings and names:
        return names
    classes = settings.get("classes", "")
    if not classes.isdecimal() or int(classes) == 0:
        raise UserError(f"{file}: expected 'classes = N', the number of classes, or a 'names' file.")
    if names is not None and len(names) != int(classes):
        raise UserError(f"{file}: classes = {classes}, but {settings['names']} has {len(names)} names.")
    return names or [f"class {label}" for label in range(int(classes))]


def _find_file(value: str, file: Path) -> Path:
    """Resolve a path in a .data file against its folder, the folder above, or the current one."""
    for folder in (file.parent, file.parent.parent, Path()):
        if (folder / value).is_file():
            return folder / value
    raise UserError(f"{file}: names the file {value}, which does not exist.")


def _record(image: Path, image_id: int, hw: tuple[int, int], classes: int, problems: Problems) -> Record:
    (height, width), objects = hw, []
    labels = label_file(image)
    text = labels.read_text(encoding="utf-8-sig", errors="replace") if labels else ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{labels}:{number}"
        row = _row(line)
        if row is None:
            problems.add(BROKEN_LABEL, place)
        elif not 0 <= row[0] < classes:
            problems.add(UNKNOWN_CLASS, f"{place} names class {row[0]:.0f} of {classes}")
        else:
            label, x, y, w, h = row
            box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            objects.append(FoundObject(box, int(label), False, place))
    return Record.of_objects(image, image_id, hw, objects)


def _row(line: str) -> list[float] | None:
    """Parse `class x y w h`; None unless all are finite and the class is an integer."""
    try:
        row = [float(value) for value in line.split()]
    except ValueError:
        return None
    well_formed = len(row) == 5 and all(map(math.isfinite, row)) and row[0].is_integer()
    return row if well_formed else None
