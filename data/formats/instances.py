"""COCO's instances json: checks of the whole file, and of its single annotations."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data.problems import BROKEN_LABEL, NO_BBOX, UNKNOWN_CLASS
from utils.errors import UserError
from utils.printable import printable

_REQUIRED = {
    "images": {"id", "file_name"},
    "annotations": set(),
    "categories": {"id", "name"},
}
_FARTHEST_PX = 1e9  # larger than any image, and within float32
_LARGEST = 1e18  # of other numbers: within int64, which COCOeval computes with


def load_instances(file: Path) -> dict[str, Any]:
    """Read the file as a dict of lists of dicts, with integer ids of images and categories. Raises UserError.

    Numbers in quotes become numbers, names of categories text; `area` and `iscrowd` that are null are left out.
    """
    content = _load_json(file)
    for key, fields in _REQUIRED.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and fields <= row.keys() for row in rows):
            required = f", each with {' and '.join(sorted(fields))}" if fields else ""
            raise UserError(f"{file}: expected COCO's instances, with a list '{key}'{required}.")
    if not content["categories"]:
        raise UserError(f"{file}: its list 'categories' is empty, so there is no class to learn.")
    for key in ("images", "categories"):
        for row in content[key]:
            row["id"] = _unquoted(row["id"])
        odd = [row["id"] for row in content[key] if not _is_id(row["id"])]
        if odd:
            raise UserError(f"{file}: expected integer ids in its list '{key}', found {json.dumps(odd[0])[:80]}.")
        repeated = [number for number, times in Counter(row["id"] for row in content[key]).items() if times > 1]
        if repeated:
            raise UserError(
                f"{file}: two rows of its list '{key}' have the id {repeated[0]}, so an annotation's reference is "
                "ambiguous: give each its own id."
            )
    for key, field in (("images", "file_name"), ("categories", "name")):
        odd = [row[field] for row in content[key] if not isinstance(row[field], str)]
        if odd and (key == "images" or not isinstance(odd[0], int | float)):
            expected = "file names" if key == "images" else "names"
            raise UserError(f"{file}: expected {expected} in its list '{key}', found {json.dumps(odd[0])[:80]}.")
    for row in content["categories"]:
        row["name"] = printable(str(row["name"]))
    for row in content["annotations"]:
        _mend(row)
    return content


def without_supercategory(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the content without category 0, and that, if it only names what the others are, as Roboflow writes it."""
    idle = next((row for row in content["categories"] if row["id"] == 0), None)
    if (
        idle is None
        or not any(row.get("supercategory") == idle["name"] for row in content["categories"] if row is not idle)
        or any(row.get("category_id") == 0 for row in content["annotations"])
    ):
        return content, None
    return content | {"categories": [row for row in content["categories"] if row is not idle]}, idle


def annotation_fault(
    annotation: dict[str, Any], image_ids: Collection[int], category_ids: Collection[int]
) -> tuple[tuple[str, str], str] | None:
    """Return why an annotation is excluded from training and COCOeval, a kind of problem and the reason; else None.

    A box without area or outside its image is none of these: COCOeval uses it, and `usable_boxes` judges it.
    """
    for key in ("id", "image_id", "category_id"):
        if isinstance(annotation.get(key), list | dict):  # not hashable
            return BROKEN_LABEL, f"expected a number as {key}, found {_shown(annotation, key)}"
    if annotation.get("image_id") not in image_ids:
        return BROKEN_LABEL, f"expected the id of an image as image_id, found {_shown(annotation, 'image_id')}"
    for key in ("area", "iscrowd"):
        if not _is_number(annotation.get(key, 0)):
            return BROKEN_LABEL, f"expected a number as {key}, found {_shown(annotation, key)}"
    if annotation.get("bbox") in (None, []):
        return NO_BBOX, "has a segmentation only" if annotation.get("segmentation") else "has no bbox"
    if not _is_box(annotation["bbox"]):
        return BROKEN_LABEL, f"expected 4 numbers as bbox, found {_shown(annotation, 'bbox')}"
    if annotation.get("category_id") not in category_ids:
        return UNKNOWN_CLASS, f"names category {_shown(annotation, 'category_id')}"
    return None


def usable_instances(file: Path, category_ids: Collection[int]) -> dict[str, Any]:
    """Read the file with these categories only, and without the annotations that have a fault."""
    content = load_instances(file)
    image_ids, known_ids = {image["id"] for image in content["images"]}, set(category_ids)
    rows = [row for row in content["annotations"] if annotation_fault(row, image_ids, known_ids) is None]
    categories = [row for row in content["categories"] if row["id"] in known_ids]
    return content | {"annotations": rows, "categories": categories}


def whole_number(value: object) -> int | None:
    """Return 5 for 5, 5.0, "5" and "5.0"; None for anything else."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
        return int(number) if number.is_integer() and abs(number) < _LARGEST else None
    except (OverflowError, ValueError):
        return None


def _load_json(file: Path) -> Any:
    if not file.is_file():  # a FIFO, for one, which could be read for ever
        raise UserError(f"{file}: is no regular file.")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid json ({error.msg}).") from error
    except RecursionError as error:
        raise UserError(f"{file}: its brackets are nested too deep for COCO's instances.") from error
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a number of thousands of digits
        raise UserError(f"{file}: cannot be read ({error}).") from error


def _mend(row: object) -> None:
    """Unquote an annotation's references, and leave out what is null, where null says no more than nothing."""
    if not isinstance(row, dict):
        return
    for key in ("image_id", "category_id"):
        if isinstance(row.get(key), str):
            row[key] = _unquoted(row[key])
    for key in ("area", "iscrowd"):
        if key in row and row[key] is None:
            del row[key]


def _unquoted(value: Any) -> Any:
    number = whole_number(value) if isinstance(value, str) else None
    return value if number is None else number


def _shown(annotation: dict[str, Any], key: str) -> str:
    try:
        return json.dumps(annotation.get(key))[:60] if key in annotation else "none"
    except ValueError:  # an integer of thousands of digits
        return "a huge number"


def _is_id(value: object) -> bool:
    return isinstance(value, int | float) and -(2**63) <= value < 2**63 and value == int(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, int | float) and abs(value) <= _FARTHEST_PX for value in box)
    )
