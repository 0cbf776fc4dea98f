"""Reader of Pascal VOC: Annotations/*.xml, JPEGImages/, and the splits in ImageSets/Main/<split>.txt."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

from data.image_file import SUFFIXES, image_hw, is_transposed
from data.image_set import FoundObject, ImageSet, Record, pack
from data.problems import (
    BROKEN_ANNOTATION,
    BROKEN_IMAGE,
    BROKEN_LABEL,
    MISSING_IMAGE,
    SWAPPED_SIZE,
    Problems,
    other_size,
)
from utils.listing import read_lines

EXPECTED = "a VOC folder (Annotations, JPEGImages, ImageSets/Main)"


def holds(path: Path) -> bool:
    return _candidate(path) is not None


def splits(path: Path) -> tuple[str, ...]:
    """Return the names of the lists in ImageSets/Main, without those of single classes (aeroplane_train.txt)."""
    lists = (_root(path) / "ImageSets" / "Main").glob("*.txt")
    return tuple(sorted(file.stem for file in lists if "_" not in file.stem))


def has_split(path: Path, split: str) -> bool:
    """Return whether the list exists, be it of a single class."""
    return _list_file(_root(path), split).is_file()


def read(path: Path, split: str) -> ImageSet:
    """Read a split. Class names are sorted over the whole Annotations folder, so that all splits have the same labels.

    An image id is the number of its annotation file in sorted order, from 1. `difficult` becomes is_crowd: such an
    object is ignored. Coordinates stay as they are written, although VOC itself counts them from 1: most sets made with
    its tools count from 0, and half a pixel is within their accuracy. Raises UserError if the list cannot be read or no
    listed image is usable.
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
    assert root is not None, "a path that `holds` does not accept"
    return root


def _candidate(path: Path) -> Path | None:
    """Return the folder itself, or the latest year's within an unpacked VOCdevkit."""
    nested = [*sorted(path.glob("VOC*"), reverse=True), *sorted(path.glob("VOCdevkit/VOC*"), reverse=True)]
    parts = ("Annotations", "JPEGImages", "ImageSets/Main")
    return next((root for root in [path, *nested] if all((root / part).is_dir() for part in parts)), None)


def _list_file(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Main" / f"{split}.txt"


def _parse(file: Path) -> ElementTree.Element | str:
    """Return the root element, or what is wrong with the file."""
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
    """Make the Record of one image; None, and a problem, if the image is missing or unreadable."""
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
    objects = []
    for number, item in enumerate(tree.iter("object"), start=1):
        place = f"Annotations/{stem}.xml object {number}"
        label, box = label_of.get((item.findtext("name") or "").strip()), _box(item)
        if label is None or box is None:
            problems.add(BROKEN_LABEL, place)
        else:
            is_crowd = (item.findtext("difficult") or "0").strip() == "1"
            objects.append(FoundObject(box, label, is_crowd, place))
    hw = _boxes_hw(f"Annotations/{stem}.xml", tree, image, hw, problems)
    return Record.of_objects(image, image_id, hw, objects)


def _box(item: ElementTree.Element) -> list[float] | None:
    try:
        box = [float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        return None
    return box if all(map(math.isfinite, box)) else None


def _boxes_hw(
    place: str, tree: ElementTree.Element, image: Path, hw: tuple[int, int], problems: Problems
) -> tuple[int, int]:
    """Return the size that boxes refer to: the upright image's, or the stored one where EXIF turns an image that was
    annotated unturned. An xml with the stored size swapped, without EXIF, is a problem."""
    written = tuple((tree.findtext(f"size/{side}") or "").strip() for side in ("height", "width"))
    if hw[0] == hw[1] or written != (str(hw[1]), str(hw[0])):
        return hw
    if is_transposed(str(image)):
        return hw[::-1]
    problems.add(SWAPPED_SIZE, other_size(place, hw[::-1], hw))
    return hw
