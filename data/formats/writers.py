"""Writers of data sets in COCO's, VOC's, YOLO's and darknet's formats, for `data.convert`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from data.image_set import ImageSet, Record, as_instances
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedSet:
    """An image set, and of each image the path below the folder of its split's images, with slashes."""

    image_set: ImageSet
    names: list[str]

    @classmethod
    def of(cls, image_set: ImageSet) -> NamedSet:
        """Name the images by their paths below the folder that all of them are in."""
        paths = [os.path.abspath(os.fsdecode(path)) for path in image_set.paths]
        common = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = [os.path.relpath(path, common).replace(os.sep, "/") for path in paths]
        stems: dict[str, str] = {}
        for name in names:
            other = stems.setdefault(os.path.splitext(name)[0], name)
            if other != name:
                raise UserError(f"{common}: {other} and {name} would share one label file: rename one.")
        return cls(image_set=image_set, names=names)

    def records(self) -> list[tuple[str, Record]]:
        return [(name, self.image_set[index]) for index, name in enumerate(self.names)]


Placing = Callable[[str, Path], None]  # links or copies an image, by its path, to a place


def write_coco(folder: Path, sets: Sequence[NamedSet], place: Placing) -> None:
    for each in sets:
        own = each.image_set
        records = each.records()
        content = as_instances((record for _, record in records), own.class_names, own.category_ids)
        for row, (name, record) in zip(content["images"], records, strict=True):
            row["file_name"] = name
            place(record.path, folder / own.split / name)
        info = {} if own.mirror_safe else {"info": {"mirror_safe": False}}
        _write(folder / "annotations" / f"instances_{own.split}.json", json.dumps(info | content))


def write_voc(folder: Path, sets: Sequence[NamedSet], place: Placing) -> None:
    """Images of several splits get their split's name in front where two would have one name."""
    stems = [{os.path.splitext(name)[0] for name in each.names} for each in sets]
    is_shared = len(set().union(*stems)) < sum(map(len, stems))
    (folder / "Annotations").mkdir(parents=True)
    for each in sets:
        listed = []
        for own_name, record in each.records():
            name = f"{each.image_set.split}/{own_name}" if is_shared else own_name
            listed.append(os.path.splitext(name)[0])
            place(record.path, folder / "JPEGImages" / name)
            xml = ElementTree.tostring(_annotation(name, record, each.image_set.class_names), encoding="unicode")
            _write(folder / "Annotations" / f"{listed[-1]}.xml", xml)
        _write(folder / "ImageSets" / "Main" / f"{each.image_set.split}.txt", "".join(f"{name}\n" for name in listed))


def write_yolo(folder: Path, sets: Sequence[NamedSet], place: Placing) -> None:
    for each in sets:
        _write_labels(folder, each, place)
    splits = {each.image_set.split: f"images/{each.image_set.split}" for each in sets}
    names = list(sets[0].image_set.class_names)
    lines = [f"{split}: {json.dumps(images, ensure_ascii=False)}" for split, images in splits.items()]
    _write(
        folder / "data.yaml",
        "\n".join([*lines, f"nc: {len(names)}", f"names: {json.dumps(names, ensure_ascii=False)}", ""]),
    )


def write_darknet(folder: Path, sets: Sequence[NamedSet], place: Placing) -> None:
    names = sets[0].image_set.class_names
    lines = [f"classes = {len(names)}"]
    for each in sets:
        split = each.image_set.split
        images = _write_labels(folder, each, place)
        lines.append(f"{'valid' if split == 'val' else split} = {split}.txt")
        _write(folder / f"{split}.txt", "".join(f"{image}\n" for image in images))
    _write(folder / "obj.names", "".join(f"{name}\n" for name in names))
    _write(folder / "obj.data", "\n".join([*lines, "names = obj.names", ""]))


WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo, "darknet": write_darknet}


def _write_labels(folder: Path, named: NamedSet, place: Placing) -> list[str]:
    """Write images/<split> and labels/<split>. Returns the images' paths below `folder`. Crowds have no label."""
    split, images = named.image_set.split, []
    for name, record in named.records():
        images.append(f"images/{split}/{name}")
        place(record.path, folder / images[-1])
        height, width = record.hw
        single = ~record.is_crowd
        boxes = record.boxes[single].astype(float) / [width, height, width, height]
        centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        rows = zip(record.labels[single].tolist(), centres.tolist(), sides.tolist(), strict=True)
        lines = [
            " ".join([str(label), *(f"{value:.9f}" for value in (*centre, *side))]) for label, centre, side in rows
        ]
        _write(folder / "labels" / split / f"{os.path.splitext(name)[0]}.txt", "".join(f"{line}\n" for line in lines))
    return images


def _annotation(name: str, record: Record, class_names: Sequence[str]) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = name
    size = ElementTree.SubElement(root, "size")
    for tag, value in zip(("width", "height", "depth"), (record.hw[1], record.hw[0], 3), strict=True):
        ElementTree.SubElement(size, tag).text = str(value)
    objects = zip(record.boxes.tolist(), record.labels.tolist(), record.is_crowd.tolist(), strict=True)
    for box, label, is_crowd in objects:
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = class_names[label]
        ElementTree.SubElement(item, "difficult").text = str(int(is_crowd))
        sides = ElementTree.SubElement(item, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(sides, tag).text = f"{value:.9g}"
    return root


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
