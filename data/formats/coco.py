"""Reader of COCO's format: one json of images, annotations and categories for each split, and folders of images.

COCO's own layout (annotations/instances_<split>.json), CVAT's, Roboflow's (<split>/_annotations.coco.json), FiftyOne's
(labels.json, data/), Label Studio's (result.json, images/), or one such json file.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from data.formats.image_finder import ImageFinder, Listings, spellings
from data.formats.instances import annotation_fault, load_instances, whole_number, without_supercategory
from data.formats.split_names import SPELLED, ordered, split_folders, usual_split
from data.formats.written_size import hw_of_annotation
from data.image_set import FoundObject, ImageSet, Record, pack
from data.problems import BROKEN_IMAGE, NO_CLASS, Problems
from utils.errors import UserError
from utils.image_file import image_fault, image_hw, is_plausible

EXPECTED = "a COCO folder (annotations/instances_<split>.json, or <split>/_annotations.coco.json), a COCO .json file"

# Up to this many images, every header is read: 0.01 ms from a cached disk, but several ms from a slow one, which would
# be many minutes for COCO's 118,287. Above, a size in the json is trusted unless boxes contradict it.
_OPENED_IMAGES = 20_000

_RESPELLED = 1000  # names that are tried in other spellings
_PEEK_BYTES = 1 << 16
_IMAGES_KEY = re.compile(rb'"images"\s*:\s*\[')


def holds(path: Path) -> bool:
    return path.suffix == ".json" if path.is_file() else bool(_files(path))


def splits(path: Path) -> tuple[str, ...]:
    """Return 'train' for instances_train2017.json etc.; () for a json that fits every split."""
    return ordered(_files(path).keys() - {""})


def has_split(path: Path, split: str) -> bool:
    """Return whether the split exists, also by its whole file name, such as val2014 beside a val2017."""
    files = _files(path)
    if path.is_file():
        return "" in files or split in (*files, path.stem.removeprefix("instances_"))
    return split in files or "" in files or _exact_file(path, split).is_file()


def read(path: Path, split: str) -> ImageSet:
    """Read a split. Labels 0..C-1 follow the sorted category ids. Sizes are as `hw_of_annotation` has them.

    Raises UserError if the json is unusable or none of its images is found.
    """
    file = _annotation_file(path, split)
    content, idle = without_supercategory(load_instances(file))
    categories = sorted(content["categories"], key=lambda category: category["id"])
    category_ids = [category["id"] for category in categories]
    problems = Problems()
    if idle is not None:
        problems.add(NO_CLASS, f"{file.name} category 0, '{idle['name']}'")
    objects = _objects_by_image(content, category_ids, file.name, problems)
    folder = _image_folder(file, split, [image["file_name"] for image in content["images"]])
    finder = ImageFinder([folder, _root(file), file.parent], problems, _root(file))
    trusted = len(content["images"]) > _OPENED_IMAGES
    records = []
    for image in content["images"]:
        image_path = finder.find(image["file_name"], place=str(folder / image["file_name"]))
        if image_path is None:
            continue
        written_hw, own = _written_hw(image), objects.get(image["id"], [])
        is_believed = trusted and written_hw and not _seems_swapped(written_hw, own)
        hw = written_hw if is_believed else image_hw(str(image_path))
        if hw is None:
            problems.add(BROKEN_IMAGE, image_fault(str(image_path)))
            continue
        hw = hw_of_annotation(str(image_path), hw, written_hw, str(image_path), problems)
        record = Record.of_objects(image_path, image["id"], hw, own)
        record.boxes[:, 2:] += record.boxes[:, :2]  # from width and height to right and bottom
        records.append(record)
    return pack(
        records,
        name=_root(path).name if path.is_file() else Path(os.path.abspath(path)).name,
        split=split,
        class_names=[str(category["name"]) for category in categories],
        category_ids=category_ids,
        problems=problems,
        source=str(file),
        coco_json=str(file),
        mirror_safe=_mirror_safe(content),
    )


def _files(path: Path) -> dict[str, Path]:
    """Return split -> its json, of several years the latest; "" -> the only one, if no split is in its name."""
    if path.is_file():
        return {_split_name(path) if path.stem.startswith("instances_") else "": path}
    files = sorted((path / "annotations").glob("instances_*.json"))
    if not files:
        named = {split: _lone_json(folder) for split, folder in split_folders(path).items()}
        by_folder = {split: file for split, file in named.items() if file is not None}
        if by_folder:
            return by_folder
        files = [*_coco_jsons(path / "annotations"), *_coco_jsons(path)]
    if len(files) == 1 and _fits_all(files[0]):
        return {"": files[0]}
    by_split = {_split_name(file): file for file in files}
    is_clear = len(by_split) == len(files) or files[0].stem.startswith("instances_")
    return by_split if is_clear else {file.stem: file for file in files}


def _fits_all(file: Path) -> bool:
    """Return whether a lone file's name says nothing of a split: CVAT's instances_default.json, or a labels.json."""
    return file.stem == "instances_default" or not (file.stem.startswith("instances_") or usual_split(file.stem))


def _lone_json(folder: Path) -> Path | None:
    files = list(islice(_coco_jsons(folder), 2))
    return files[0] if len(files) == 1 else None


def _coco_jsons(folder: Path) -> Iterable[Path]:
    """Yield the json files that have a list of images, by their first or last bytes."""
    return (file for file in sorted(folder.glob("*.json")) if file.is_file() and _lists_images(file))


def _lists_images(file: Path) -> bool:
    try:
        with open(file, "rb") as stream:
            start = stream.read(_PEEK_BYTES)
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _PEEK_BYTES))
            is_object = start.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{"
            return is_object and any(map(_IMAGES_KEY.search, (start, stream.read())))
    except OSError:
        return False


def _split_name(file: Path) -> str:
    """Return train for instances_train2017.json and instances_Train.json, val for valid.json and my_val.json."""
    name = file.stem.removeprefix("instances_")
    name = re.sub(r"\d{4}$", "", name) or name
    is_instances = file.stem.startswith("instances_")
    return SPELLED.get(name.lower(), name) if is_instances else usual_split(name) or name


def _annotation_file(path: Path, split: str) -> Path:
    """Return instances_<split>.json, or of several years the latest."""
    if path.is_file():
        return path
    exact, files = _exact_file(path, split), _files(path)
    return exact if exact.is_file() else files.get(split, files.get("", exact))


def _exact_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _root(file: Path) -> Path:
    """Return the data set's folder by the path of the file, which may be a link to another place."""
    folder = Path(os.path.abspath(file)).parent
    return folder.parent if folder.name == "annotations" else folder


def _image_folder(file: Path, split: str, file_names: list[str]) -> Path:
    """Return the first of the usual folders that holds the first image found in any of them.

    Names that leave their folder by `..` and names in another spelling are tried last.
    """
    folders: list[Path] = []
    for json in (file, file.resolve()):
        root, stem = _root(json), json.stem.removeprefix("instances_")
        folders += [root / part / name for part in ("", "images") for name in (stem, split, "")]
        folders += [json.parent, json.parent / "images", root / "JPEGImages", root / "data"]
    folders = list(dict.fromkeys(folders))
    existing = [folder for folder in folders if folder.is_dir()]
    listings = Listings()
    for name in sorted(file_names, key=lambda name: ".." in name):
        for folder in existing:
            if listings.has(os.path.join(folder, name)):
                return folder
    for name in file_names[:_RESPELLED]:
        for folder in (*existing, *sorted(each for each in _root(file).iterdir() if each.is_dir())):
            if any(listings.has(os.path.join(folder, spelling)) for spelling in spellings(name)):
                return folder
    if not file_names:
        raise UserError(f"{file}: its list 'images' is empty.")
    searched = ", ".join(map(str, folders))
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
        else:
            kind, reason = fault
            problems.add(kind, f"{place}: {reason}")
    return objects


def _mirror_safe(content: dict[str, Any]) -> bool:
    info = content.get("info")
    return bool(info.get("mirror_safe", True)) if isinstance(info, dict) else True


def _written_hw(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = whole_number(image.get("height")), whole_number(image.get("width"))
    return (height, width) if height and width and is_plausible((height, width)) else None


def _seems_swapped(hw: tuple[int, int], objects: list[FoundObject]) -> bool:
    """Return whether boxes exceed this size by more than rounding, but fit it with its sides swapped."""
    right = max((box[0] + box[2] for box, *_ in objects), default=0) - 1
    bottom = max((box[1] + box[3] for box, *_ in objects), default=0) - 1
    height, width = hw
    return (right > width or bottom > height) and right <= height and bottom <= width
