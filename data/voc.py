"""Pascal VOC: Annotations/*.xml, JPEGImages/, and the splits in ImageSets/Main/<split>.txt."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from data.image_file import SUFFIXES, image_hw, is_transposed
from data.image_set import ImageSet, Record, pack
from data.problems import (
    BROKEN_ANNOTATION,
    BROKEN_IMAGE,
    BROKEN_LABEL,
    MISSING_IMAGE,
    SWAPPED_SIZE,
    Problems,
    other_size,
    usable_boxes,
)
from utils.listing import read_lines


def holds(path: Path) -> bool:
    return _candidate(path) is not None


def splits(path: Path) -> tuple[str, ...]:
    """The lists in ImageSets/Main, but for those of one class each (aeroplane_train.txt)."""
    lists = (_root(path) / "ImageSets" / "Main").glob("*.txt")
    return tuple(sorted(file.stem for file in lists if "_" not in file.stem))


def has_split(path: Path, split: str) -> bool:
    """Any list that is there, one of a class, too."""
    return _list_file(_root(path), split).is_file()


def read(path: Path, split: str) -> ImageSet:
    """Class names are sorted over the whole Annotations folder, so that every split has the same labels.

    An image id counts the sorted annotation files from 1. `difficult` becomes is_crowd: such an object is
    neither rewarded nor punished. Coordinates stay as they are written, although VOC itself counts them
    from 1: most sets made with its tools count from 0, and half a pixel either way is within their care.
    Raises UserError if the list cannot be read or no listed image is usable.
    """
    root = _root(path)
    trees = {file.stem: _parse(file) for file in sorted((root / "Annotations").glob("*.xml"))}
    names = {name for tree in trees.values() if not isinstance(tree, str) for name in _class_names(tree)}
    labels = {name: label for label, name in enumerate(sorted(names))}
    image_ids = {stem: number for number, stem in enumerate(trees, start=1)}
    split_file = _list_file(root, split)
    problems, records = Problems(), []
    for line in read_lines(split_file):
        stem = next((name for name in (line, line.split()[0]) if name in trees), line)
        tree = trees.get(stem, f"Annotations/{stem}.xml: missing")
        if isinstance(tree, str):
            problems.add(BROKEN_ANNOTATION, tree)
            continue
        record = _record(root, stem, image_ids[stem], tree, labels, problems)
        if record is not None:
            records.append(record)
    return pack(
        records,
        name=root.resolve().name,
        split=split,
        class_names=list(labels),
        category_ids=range(1, len(labels) + 1),
        problems=problems,
        source=str(split_file),
    )


def _root(path: Path) -> Path:
    root = _candidate(path)
    assert root is not None, "asked to read what `holds` said no to"
    return root


def _candidate(path: Path) -> Path | None:
    """The folder itself, or the one year's within a VOCdevkit, as it is unpacked; of several the latest."""
    nested = [*sorted(path.glob("VOC*"), reverse=True), *sorted(path.glob("VOCdevkit/VOC*"), reverse=True)]
    wanted = ("Annotations", "JPEGImages", "ImageSets/Main")
    return next((root for root in [path, *nested] if all((root / part).is_dir() for part in wanted)), None)


def _list_file(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Main" / f"{split}.txt"


def _parse(file: Path) -> ElementTree.Element | str:
    """The root element, or what is wrong with the file."""
    try:
        return ElementTree.parse(file).getroot()
    except OSError as error:
        return f"Annotations/{file.name}: {error.strerror}"
    except (ElementTree.ParseError, UnicodeDecodeError, ValueError) as error:
        line = f":{error.position[0]}" if isinstance(error, ElementTree.ParseError) else ""
        return f"Annotations/{file.name}{line}: {error}"


def _class_names(tree: ElementTree.Element) -> set[str]:
    return {(item.findtext("name") or "").strip() for item in tree.iter("object")} - {""}


def _record(
    root: Path,
    stem: str,
    image_id: int,
    tree: ElementTree.Element,
    label_of: dict[str, int],
    problems: Problems,
) -> Record | None:
    """None, and a problem, if there is no readable image."""
    names = [*(stem + suffix for suffix in SUFFIXES), (tree.findtext("filename") or "").strip()]
    images = (root / "JPEGImages" / name for name in names if name)
    image = next((image for image in images if image.is_file()), None)
    if image is None:
        problems.add(MISSING_IMAGE, f"JPEGImages/{names[0]}")
        return None
    hw = image_hw(str(image))
    if hw is None:
        problems.add(BROKEN_IMAGE, f"JPEGImages/{image.name}")
        return None
    rows, labels, is_crowd, places = [], [], [], []
    for number, item in enumerate(tree.iter("object"), start=1):
        place = f"Annotations/{stem}.xml object {number}"
        label, box = label_of.get((item.findtext("name") or "").strip()), _box(item)
        if label is None or box is None:
            problems.add(BROKEN_LABEL, place)
            continue
        rows.append(box)
        places.append(place)
        labels.append(label)
        is_crowd.append((item.findtext("difficult") or "0").strip() == "1")
    boxes = np.array(rows, np.float32).reshape(-1, 4)
    hw = _boxes_hw(f"Annotations/{stem}.xml", tree, image, hw, problems)
    boxes, keep = usable_boxes(boxes, hw, places, problems)
    return Record(
        path=str(image),
        image_id=image_id,
        boxes=boxes[keep],
        labels=np.array(labels, np.int64)[keep],
        is_crowd=np.array(is_crowd, bool)[keep],
        hw=hw,
    )


def _box(item: ElementTree.Element) -> list[float] | None:
    try:
        box = [float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        return None
    return box if all(map(math.isfinite, box)) else None


def _boxes_hw(
    place: str, tree: ElementTree.Element, image: Path, hw: tuple[int, int], problems: Problems
) -> tuple[int, int]:
    """The image's own size, upright; as stored where EXIF turns it and the xml says that it was labelled so.

    Where the xml says so without EXIF, that is a problem.
    """
    written = tuple((tree.findtext(f"size/{side}") or "").strip() for side in ("height", "width"))
    if hw[0] == hw[1] or written != (str(hw[1]), str(hw[0])):
        return hw
    if is_transposed(str(image)):
        return hw[::-1]
    problems.add(SWAPPED_SIZE, other_size(place, hw[::-1], hw))
    return hw
