"""Reader of COCO's format: annotations/instances_<split>.json beside folders of images, or one such json file."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from data.image_file import image_hw, is_transposed, lies_on_its_side
from data.image_set import FoundObject, ImageSet, Record, pack
from data.instances import annotation_fault, load_instances
from data.problems import (
    BROKEN_IMAGE,
    MISSING_IMAGE,
    SWAPPED_SIZE,
    UNKNOWN_CLASS,
    Problems,
    other_size,
)
from utils.errors import UserError

EXPECTED = "a COCO folder (annotations/instances_<split>.json), a COCO .json file"

# Up to this many images, every header is read: 0.01 ms from a cached disk, but several ms from a slow one, which would
# be many minutes for COCO's 118,287. Above, a size in the json is trusted unless boxes contradict it.
_OPENED_IMAGES = 20_000


def holds(path: Path) -> bool:
    return path.suffix == ".json" or any((path / "annotations").glob("instances_*.json"))


def splits(path: Path) -> tuple[str, ...]:
    """Return 'train' for instances_train2017.json etc.; () for a json file of another name, which fits every split."""
    if path.is_file():
        return (_split_name(path),) if path.stem.startswith("instances_") else ()
    return tuple(sorted({_split_name(file) for file in (path / "annotations").glob("instances_*.json")}))


def has_split(path: Path, split: str) -> bool:
    """Return whether the split exists, also by its whole file name, such as val2014 beside a val2017."""
    listed = splits(path)
    if path.is_file():
        return not listed or split in (*listed, path.stem.removeprefix("instances_"))
    return split in listed or _exact_file(path, split).is_file()


def read(path: Path, split: str) -> ImageSet:
    """Read a split. Labels 0..C-1 follow the sorted category ids. Sizes are the json's, where given (see `_boxes_hw`).

    Raises UserError if the json is unusable or none of its images is found.
    """
    file = path if path.is_file() else _annotation_file(path, split)
    content = load_instances(file)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    category_ids = [category["id"] for category in categories]
    problems = Problems()
    objects = _objects_by_image(content, category_ids, file.name, problems)
    folder = _image_folder(file, split, [image["file_name"] for image in content["images"]])
    trusted = len(content["images"]) > _OPENED_IMAGES
    records = []
    for image in content["images"]:
        image_path = folder / image["file_name"]
        if not image_path.exists():
            problems.add(MISSING_IMAGE, str(image_path))
            continue
        written_hw, own = _written_hw(image), objects.get(image["id"], [])
        is_plausible = trusted and written_hw and not _seems_swapped(written_hw, own)
        hw = written_hw if is_plausible else image_hw(str(image_path))
        if hw is None:
            problems.add(BROKEN_IMAGE, str(image_path))
            continue
        hw = _boxes_hw(image_path, hw, written_hw, problems)
        record = Record.of_objects(image_path, image["id"], hw, own)
        record.boxes[:, 2:] += record.boxes[:, :2]  # from width and height to right and bottom
        records.append(record)
    return pack(
        records,
        name=_root(file).name,
        split=split,
        class_names=[str(category["name"]) for category in categories],
        category_ids=category_ids,
        problems=problems,
        source=str(file),
        coco_json=str(file),
        mirror_safe=_mirror_safe(content),
    )


def _split_name(file: Path) -> str:
    name = file.stem.removeprefix("instances_")
    return re.sub(r"\d{4}$", "", name) or name


def _annotation_file(root: Path, split: str) -> Path:
    """Return instances_<split>.json, or of several years the latest."""
    exact = _exact_file(root, split)
    dated = sorted(file for file in exact.parent.glob("instances_*.json") if _split_name(file) == split)
    return exact if exact.exists() else dated[-1]


def _exact_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _root(file: Path) -> Path:
    """Return the data set's folder by the path of the file, which may be a link to another place."""
    folder = Path(os.path.abspath(file)).parent
    return folder.parent if folder.name == "annotations" else folder


def _image_folder(file: Path, split: str, file_names: list[str]) -> Path:
    """Return the first of the usual folders that holds the first image found in any of them."""
    folders: list[Path] = []
    for json in (file, file.resolve()):
        root, stem = _root(json), json.stem.removeprefix("instances_")
        folders += [root / part / name for part in ("", "images") for name in (stem, split, "")]
        folders += [json.parent, json.parent / "images", root / "JPEGImages", root / "data"]
    existing = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    for name in file_names:
        for folder in existing:
            if (folder / name).exists():
                return folder
    if not file_names:
        raise UserError(f"{file}: its list 'images' is empty.")
    searched = ", ".join(map(str, dict.fromkeys(folders)))
    raise UserError(f"{file}: its images, such as {file_names[0]}, are in none of {searched}.")


def _objects_by_image(
    content: dict[str, Any], category_ids: list[int], file_name: str, problems: Problems
) -> dict[int, list[FoundObject]]:
    """Return image id -> its well-formed annotations; their boxes are left, top, width and height."""
    label_of = {category: label for label, category in enumerate(category_ids)}
    image_ids = {image["id"] for image in content["images"]}
    objects: dict[int, list[FoundObject]] = defaultdict(list)
    for row, annotation in enumerate(content["annotations"]):
        place = f"{file_name} annotation {annotation.get('id', f'in row {row}')}"
        fault = annotation_fault(annotation, image_ids, label_of)
        if fault is None:
            label, is_crowd = label_of[annotation["category_id"]], bool(annotation.get("iscrowd", 0))
            objects[annotation["image_id"]].append(FoundObject(annotation["bbox"], label, is_crowd, place))
        elif fault == UNKNOWN_CLASS:
            problems.add(fault, f"{place} names category {annotation.get('category_id')}")
        else:
            problems.add(fault, place)
    return objects


def _mirror_safe(content: dict[str, Any]) -> bool:
    info = content.get("info")
    return bool(info.get("mirror_safe", True)) if isinstance(info, dict) else True


def _written_hw(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return None


def _seems_swapped(hw: tuple[int, int], objects: list[FoundObject]) -> bool:
    """Return whether boxes exceed this size by more than rounding, but fit it with its sides swapped."""
    right = max((box[0] + box[2] for box, *_ in objects), default=0) - 1
    bottom = max((box[1] + box[3] for box, *_ in objects), default=0) - 1
    height, width = hw
    return (right > width or bottom > height) and right <= height and bottom <= width


def _boxes_hw(
    image_path: Path, hw: tuple[int, int], written_hw: tuple[int, int] | None, problems: Problems
) -> tuple[int, int]:
    """Return the size that boxes refer to: the written one, if any. hw: of the upright image.

    Where the written size lies on its side and no EXIF tag explains it, its sides are swapped, and that is a problem.
    """
    if written_hw is None or not lies_on_its_side(hw, written_hw) or is_transposed(str(image_path)):
        return written_hw or hw
    problems.add(SWAPPED_SIZE, other_size(str(image_path), written_hw, hw))
    return written_hw[::-1]
