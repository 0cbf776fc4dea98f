"""Reader of Pascal VOC's xml files: in VOC's folders, with or without lists, or beside the images.

VOC and CVAT: Annotations/**/*.xml, JPEGImages/**, and the splits in ImageSets/Main/<split>.txt. Roboflow: xml and image
side by side in train, valid and test. LabelImg: all in one folder. Where no list divides the images, the only split is
`all`.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

from data.formats.image_finder import ImageFinder, is_image_name, spellings
from data.formats.split_names import WHOLE, ordered, split_folders
from data.formats.written_size import hw_of_annotation
from data.image_set import FoundObject, ImageSet, Record, pack
from data.problems import (
    BROKEN_ANNOTATION,
    BROKEN_IMAGE,
    BROKEN_LABEL,
    NO_ANNOTATION,
    OTHER_SIZE_BOXES,
    Problems,
    other_size,
)
from utils.errors import UserError
from utils.image_file import SUFFIXES, image_fault, image_hw, is_plausible
from utils.listing import decoded, read_bounded, read_lines
from utils.printable import printable

EXPECTED = "a VOC folder (Annotations, JPEGImages, maybe ImageSets/Main; or .xml beside the images)"

_MOST_XML_BYTES = 1 << 24
_XML = "*.[xX][mM][lL]"  # globs see the letter case on Linux
_PEEKED = 20  # xml files that are looked into, to know the format
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_ANNOTATION_FOLDERS = ("Annotations", "annotations", "xmls", "labels")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs")
_ENCODING = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where the files are. images: None if they stand beside the xml files.

    lists: split -> its list of images. folders: split -> the folder of its xml files, where there are no lists.
    """

    root: Path
    annotations: tuple[Path, ...]
    images: Path | None
    lists: dict[str, Path]
    folders: dict[str, Path]


def holds(path: Path) -> bool:
    return _layout(path) is not None


def splits(path: Path) -> tuple[str, ...]:
    """Return the names of the lists in ImageSets/Main, without those of single classes (aeroplane_train.txt)."""
    layout = _known_layout(path)
    if layout.folders:
        return ordered(layout.folders)
    return tuple(sorted(split for split in layout.lists if "_" not in split))


def has_split(path: Path, split: str) -> bool:
    """Return whether the list exists, be it of a single class."""
    layout = _known_layout(path)
    return split in layout.folders or split in layout.lists


def read(path: Path, split: str) -> ImageSet:
    """Read a split. Class names are sorted over all annotation files, so that all splits have the same labels.

    An image id is the number of its annotation file in sorted order, from 1. `difficult` becomes is_crowd: such an
    object is ignored. Coordinates stay as they are written, although VOC itself counts them from 1: most sets made with
    its tools count from 0, and half a pixel is within their accuracy. Raises UserError if the list cannot be read or no
    listed image is usable.
    """
    layout = _known_layout(path)
    files = {name: file for folder in layout.annotations for name, file in _xml_files(folder, layout.root)}
    trees = {name: _parse(file, name) for name, file in files.items()}
    names = {name for tree in trees.values() if not isinstance(tree, str) for name in _class_names(tree)}
    labels = {name: label for label, name in enumerate(sorted(names))}
    image_ids = {name: number for number, name in enumerate(trees, start=1)}
    problems, records, found = Problems(), [], set[str]()
    finder = ImageFinder([layout.images] if layout.images else layout.annotations, problems, layout.root)
    for name in _listed(layout, split, files):
        tree = trees.get(name, f"{_named(layout, name)}: missing")
        if isinstance(tree, str):
            problems.add(BROKEN_ANNOTATION, tree)
            continue
        place = _named(layout, name)
        image = _image(finder, layout, name, files[name], _text(tree, "filename"))
        found.add(os.path.realpath(image or ""))
        record = None if image is None else _record(image, place, image_ids[name], tree, labels, problems)
        if record is not None:
            records.append(record)
    if split not in layout.lists:
        for image in sorted((layout.images or layout.folders[split]).rglob("*")):
            if is_image_name(image.name) and os.path.realpath(image) not in found:
                problems.add(NO_ANNOTATION, str(image))
    return pack(
        records,
        name=layout.root.resolve().name,
        split=split,
        class_names=list(labels),
        category_ids=range(1, len(labels) + 1),
        problems=problems,
        source=str(layout.lists.get(split, layout.folders.get(split, layout.root))),
    )


def _known_layout(path: Path) -> _Layout:
    layout = _layout(path)
    assert layout is not None, "a path that `holds` does not accept"
    return layout


def _layout(path: Path) -> _Layout | None:
    """Find the layout of the folder itself, or of the latest year's within an unpacked VOCdevkit."""
    if not path.is_dir():
        return None
    nested = [*sorted(path.glob("VOC*"), reverse=True), *sorted(path.glob("VOCdevkit/VOC*"), reverse=True)]
    layouts = (_own_folders(root) for root in [path, *nested])
    return next(filter(None, layouts), None) or _beside_images(path)


def _own_folders(root: Path) -> _Layout | None:
    """VOC's: separate folders of xml files and images, with or without lists."""
    annotations = next((root / name for name in _ANNOTATION_FOLDERS if _has_xml(root / name)), root / "Annotations")
    images = next((root / name for name in _IMAGE_FOLDERS if (root / name).is_dir()), None)
    main = root / "ImageSets" / "Main"
    if not annotations.is_dir() or images is None or not (main.is_dir() or _has_xml(annotations)):
        return None
    lists = {file.stem: file for file in main.glob("*.txt")}
    folders = {} if lists or main.is_dir() else {WHOLE: annotations}
    return _Layout(root=root, annotations=(annotations,), images=images, lists=lists, folders=folders)


def _beside_images(root: Path) -> _Layout | None:
    """Roboflow's and LabelImg's: xml and image side by side."""
    folders = {split: folder for split, folder in split_folders(root).items() if _has_xml(folder, _XML)}
    if not folders and _has_xml(root, _XML):
        folders = {WHOLE: root}
    if not folders:
        return None
    return _Layout(root=root, annotations=tuple(folders.values()), images=None, lists={}, folders=folders)


def _has_xml(folder: Path, *patterns: str) -> bool:
    """Return whether the folder, or by default also one in it, has an annotation file among its first xml files."""
    patterns = patterns or (_XML, f"*/{_XML}")
    files = islice((file for pattern in patterns for file in folder.glob(pattern)), _PEEKED)
    return any(file.is_file() and _is_annotation(file) for file in files)


def _is_annotation(file: Path) -> bool:
    with open(file, "rb") as stream:
        return b"<annotation" in stream.read(4096).replace(b"\0", b"")


def _xml_files(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, file): the path without .xml, below Annotations or, in a set without that folder, below the root."""
    base = folder if folder.name in _ANNOTATION_FOLDERS else root
    for file in sorted(folder.rglob(_XML)):
        yield file.relative_to(base).with_suffix("").as_posix(), file


def _named(layout: _Layout, name: str) -> str:
    """Return how messages call an annotation file."""
    return f"{layout.annotations[0].name}/{name}.xml" if layout.images else f"{name}.xml"


def _listed(layout: _Layout, split: str, files: dict[str, Path]) -> Iterator[str]:
    """Yield the names of a split's annotation files; of a line without one, the line."""
    if split not in layout.lists:
        folder = layout.folders[split]
        yield from (name for name, file in files.items() if file.is_relative_to(folder))
        return
    times = Counter(name.rpartition("/")[2] for name in files)
    by_last = {last: name for name in files if times[last := name.rpartition("/")[2]] == 1}
    for line in read_lines(layout.lists[split]):
        found = next((name for name in _names_in(line) if name in files), None)
        yield found or by_last.get(line, line)


def _names_in(line: str) -> Iterator[str]:
    """Yield what a line of a list may mean: a name, maybe in quotes, with a flag behind, an ending, or a whole path."""
    quoted = re.match(r"""(["'])(.+)\1""", line)
    for text in (line, line.split()[0], line.rsplit(None, 1)[0], quoted[2] if quoted else line):
        for name in spellings(text):
            yield name
            stem, dot, ending = name.rpartition(".")
            if dot and f".{ending.lower()}" in {*SUFFIXES, ".xml"}:
                yield stem


def _parse(file: Path, name: str) -> ElementTree.Element | str:
    """Return the root element, or what is wrong with the file."""
    place = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        return f"{place}: {'Is a directory' if file.is_dir() else 'is no regular file'}"
    try:
        content = read_bounded(file, _MOST_XML_BYTES)
        declared = _ENCODING.match(content[:1000])
        # Python knows more encodings than expat does, GBK for one.
        text = content[declared.end() :].decode(declared[1].decode()) if declared else decoded(content)
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            return f"{place}: expected plain xml, found a DOCTYPE or ENTITY, which is not read"
        return ElementTree.fromstring(text)
    except UserError as error:
        return str(error)
    except UnicodeDecodeError as error:
        return f"{place}: expected {error.encoding}, found other bytes: name the encoding in <?xml encoding=...?>"
    except LookupError:
        return f"{place}: names the unknown encoding {declared[1].decode() if declared else ''}"
    except (ElementTree.ParseError, ValueError) as error:
        line = f":{error.position[0]}" if isinstance(error, ElementTree.ParseError) else ""
        return f"{place}{line}: {error}"


def _text(item: ElementTree.Element, path: str) -> str:
    return (item.findtext(path) or "").strip()


def _class_names(tree: ElementTree.Element) -> set[str]:
    return {printable(_text(item, "name")) for item in tree.iter("object")} - {""}


def _image(finder: ImageFinder, layout: _Layout, name: str, file: Path, written: str) -> Path | None:
    """Find the image by the name of its annotation file, then by its <filename>; else None and a problem."""
    stem = os.path.join(layout.images or layout.root, name)
    for path in [each + suffix for each in dict.fromkeys((stem, str(file)[:-4])) for suffix in SUFFIXES]:
        if finder.listings.has(path):
            return Path(path)
    for suffix in SUFFIXES:
        found = finder.listings.in_other_case(stem + suffix)
        if found is not None:
            return Path(found)
    return finder.find(written or name + SUFFIXES[0], place=f"{Path(stem).parent.name}/{Path(stem).name}{SUFFIXES[0]}")


def _record(
    image: Path, place: str, image_id: int, tree: ElementTree.Element, label_of: dict[str, int], problems: Problems
) -> Record | None:
    """Make the Record of one image; None, and a problem, if the image is unreadable. place: its annotation file."""
    hw = image_hw(str(image))
    if hw is None:
        problems.add(BROKEN_IMAGE, image_fault(str(image)))
        return None
    objects = []
    for number, item in enumerate(tree.iter("object"), start=1):
        label, box = label_of.get(printable(_text(item, "name"))), _box(item)
        if label is None:
            problems.add(BROKEN_LABEL, f"{place} object {number}: expected a class in <name>, found none")
        elif isinstance(box, str):
            problems.add(BROKEN_LABEL, f"{place} object {number}: {box}")
        else:
            is_crowd = _text(item, "difficult") == "1"
            objects.append(FoundObject(box, label, is_crowd, f"{place} object {number}"))
    hw = _boxes_hw(place, tree, image, hw, objects, problems)
    return Record.of_objects(image, image_id, hw, objects)


def _box(item: ElementTree.Element) -> list[float] | str:
    """Return xyxy, or what is wrong with it."""
    texts = {side: _text(item, f"bndbox/{side}") for side in _SIDES}
    try:
        box = [float(text) for text in texts.values()]
    except ValueError:
        box = []
    if box and all(map(math.isfinite, box)):
        return box
    if item.find("bndbox") is None:
        others = ", ".join(f"<{child.tag}>" for child in islice(item, 6)) or "nothing"
        return printable(f"expected <bndbox>, found {others}")
    return printable("expected numbers in <bndbox>, found " + ", ".join(f"{k}={v[:20]!r}" for k, v in texts.items()))


def _boxes_hw(
    place: str,
    tree: ElementTree.Element,
    image: Path,
    hw: tuple[int, int],
    objects: list[FoundObject],
    problems: Problems,
) -> tuple[int, int]:
    """Return the size that boxes refer to: the image's, if they fit it, but not the written one; that is a problem."""
    written_hw = _written_hw(tree)
    right, bottom = (max((each.box[side] for each in objects), default=0) - 1 for side in (2, 3))
    if written_hw is not None and written_hw not in (hw, hw[::-1]):
        height, width = written_hw
        if (right > width or bottom > height) and right <= hw[1] and bottom <= hw[0]:
            problems.add(OTHER_SIZE_BOXES, other_size(place, written_hw, hw))
            return hw
    return hw_of_annotation(str(image), hw, written_hw, place, problems)


def _written_hw(tree: ElementTree.Element) -> tuple[int, int] | None:
    try:
        height, width = (int(float(_text(tree, f"size/{side}"))) for side in ("height", "width"))
    except (ValueError, OverflowError):
        return None
    return (height, width) if is_plausible((height, width)) else None
