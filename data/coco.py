"""COCO: annotations/instances_<split>.json beside folders of pictures, or one such json file."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from data.image_set import ImageSet, Record, pack
from data.picture import picture_hw
from data.problems import BROKEN_LABEL, BROKEN_PICTURE, MISSING_PICTURE, UNKNOWN_CLASS, Problems, usable_boxes
from utils.errors import UserError


def holds(path: Path) -> bool:
    return path.suffix == ".json" or any((path / "annotations").glob("instances_*.json"))


def splits(path: Path) -> tuple[str, ...]:
    """'train' for instances_train2017.json. A json file of another name gives (): it fits every split."""
    if path.is_file():
        return (_split_name(path),) if path.stem.startswith("instances_") else ()
    return tuple(sorted({_split_name(file) for file in (path / "annotations").glob("instances_*.json")}))


def read(path: Path, split: str) -> ImageSet:
    """Labels 0..C-1 follow the sorted category ids. Pictures are not opened: their sizes are the json's.

    Raises UserError if the json is unusable or none of its pictures is found.
    """
    file = path if path.is_file() else _annotation_file(path, split)
    content = _load(file)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    category_ids = [category["id"] for category in categories]
    problems = Problems()
    objects = _objects_by_image(content["annotations"], category_ids, file.name, problems)
    folder = _picture_folder(file, split, [image["file_name"] for image in content["images"][:20]])
    records = []
    for image in content["images"]:
        picture = folder / image["file_name"]
        if not picture.exists():
            problems.add(MISSING_PICTURE, str(picture))
            continue
        hw = _written_hw(image) or picture_hw(str(picture))
        if hw is None:
            problems.add(BROKEN_PICTURE, str(picture))
            continue
        records.append(_record(picture, image["id"], hw, objects.get(image["id"], []), file.name, problems))
    return pack(
        records,
        name=_root(file).name,
        split=split,
        class_names=[str(category["name"]) for category in categories],
        category_ids=category_ids,
        problems=problems,
        source=str(file),
        coco_json=str(file),
        mirror_safe=bool(content.get("info", {}).get("mirror_safe", True)),
    )


def _split_name(file: Path) -> str:
    name = file.stem.removeprefix("instances_")
    return re.sub(r"\d{4}$", "", name) or name


def _annotation_file(root: Path, split: str) -> Path:
    """instances_<split>.json, or of several years the latest."""
    folder = root / "annotations"
    exact = folder / f"instances_{split}.json"
    dated = sorted(file for file in folder.glob("instances_*.json") if _split_name(file) == split)
    return exact if exact.exists() else dated[-1]


def _root(file: Path) -> Path:
    return file.resolve().parent.parent if file.resolve().parent.name == "annotations" else file.resolve().parent


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid json ({error.msg}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}).") from error
    needed = {
        "images": {"id", "file_name"},
        "annotations": set(),
        "categories": {"id", "name"},
    }
    for key, fields in needed.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and fields <= row.keys() for row in rows):
            wanted = f", each with {' and '.join(sorted(fields))}" if fields else ""
            raise UserError(f"{file}: expected COCO's instances, with a list '{key}'{wanted}.")
    if not content["categories"]:
        raise UserError(f"{file}: its list 'categories' is empty, so there is no class to learn.")
    return content


def _picture_folder(file: Path, split: str, file_names: list[str]) -> Path:
    """The first of the usual folders that holds one of the first pictures."""
    root, stem = _root(file), file.stem.removeprefix("instances_")
    folders = [root / part / name for part in ("", "images") for name in (stem, split, "")]
    folders += [file.parent, file.parent / "images", root / "JPEGImages", root / "data"]
    for folder in dict.fromkeys(folders):
        if any((folder / name).exists() for name in file_names):
            return folder
    if not file_names:
        raise UserError(f"{file}: its list 'images' is empty.")
    raise UserError(f"{file}: its pictures, such as {file_names[0]}, are in none of {_listing(folders)}.")


def _listing(folders: list[Path]) -> str:
    return ", ".join(str(folder) for folder in dict.fromkeys(folders))


def _objects_by_image(
    annotations: list[dict[str, Any]], category_ids: list[int], file_name: str, problems: Problems
) -> dict[int, list[tuple[list[float], int, bool, str]]]:
    """image id -> (x, y, w, h), label, is_crowd and place of each well-formed annotation."""
    label_of = {category: label for label, category in enumerate(category_ids)}
    objects: dict[int, list[tuple[list[float], int, bool, str]]] = defaultdict(list)
    for row, annotation in enumerate(annotations):
        place = f"{file_name}, annotation {annotation.get('id', f'in row {row}')}"
        box = annotation.get("bbox")
        if box is None or not _is_box(box) or "image_id" not in annotation:
            problems.add(BROKEN_LABEL, place)
        elif annotation.get("category_id") not in label_of:
            problems.add(UNKNOWN_CLASS, f"{place}, category {annotation.get('category_id')}")
        else:
            label = label_of[annotation["category_id"]]
            objects[annotation["image_id"]].append((box, label, bool(annotation.get("iscrowd", 0)), place))
    return objects


def _written_hw(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) and height * width else None


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, int | float) and math.isfinite(value) for value in box)
    )


def _record(
    picture: Path,
    image_id: int,
    hw: tuple[int, int],
    objects: list[tuple[list[float], int, bool, str]],
    file_name: str,
    problems: Problems,
) -> Record:
    boxes = np.array([box for box, _, _, _ in objects], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes, keep = usable_boxes(boxes, hw, [place for *_, place in objects], problems)
    return Record(
        path=str(picture),
        image_id=image_id,
        boxes=boxes[keep],
        labels=np.array([label for _, label, _, _ in objects], np.int64)[keep],
        is_crowd=np.array([is_crowd for _, _, is_crowd, _ in objects], bool)[keep],
        hw=hw,
    )
