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

_REQUIRED = {
    "images": {"id", "file_name"},
    "annotations": set(),
    "categories": {"id", "name"},
}
_FARTHEST_PX = 1e9  # larger than any image, and within float32


def load_instances(file: Path) -> dict[str, Any]:
    """Read the file as a dict of lists of dicts, with integer ids of images and categories. Raises UserError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid json ({error.msg}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}).") from error
    for key, fields in _REQUIRED.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and fields <= row.keys() for row in rows):
            required = f", each with {' and '.join(sorted(fields))}" if fields else ""
            raise UserError(f"{file}: expected COCO's instances, with a list '{key}'{required}.")
    if not content["categories"]:
        raise UserError(f"{file}: its list 'categories' is empty, so there is no class to learn.")
    for key in ("images", "categories"):
        odd = [row["id"] for row in content[key] if not _is_id(row["id"])]
        if odd:
            raise UserError(f"{file}: expected integer ids in its list '{key}', found {json.dumps(odd[0])[:80]}.")
        repeated = [number for number, times in Counter(row["id"] for row in content[key]).items() if times > 1]
        if repeated:
            raise UserError(
                f"{file}: two rows of its list '{key}' have the id {repeated[0]}, so an annotation's reference is "
                "ambiguous: give each its own id."
            )
    odd = [row["file_name"] for row in content["images"] if not isinstance(row["file_name"], str)]
    if odd:
        raise UserError(f"{file}: expected file names in its list 'images', found {json.dumps(odd[0])[:80]}.")
    return content


def annotation_fault(
    annotation: dict[str, Any], image_ids: Collection[int], category_ids: Collection[int]
) -> tuple[str, str] | None:
    """Return the kind of problem that excludes an annotation from training and from COCOeval, or None.

    A box without area or outside its image is none of these: COCOeval uses it, and `usable_boxes` judges it.
    """
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    if any(isinstance(each, list | dict) for each in (annotation.get("id"), image_id, category_id)):
        return BROKEN_LABEL  # not hashable
    numbers = (annotation.get("area", 0), annotation.get("iscrowd", 0))
    if image_id not in image_ids or not all(map(_is_number, numbers)):
        return BROKEN_LABEL
    if annotation.get("bbox") in (None, []):
        return NO_BBOX
    if not _is_box(annotation["bbox"]):
        return BROKEN_LABEL
    return None if category_id in category_ids else UNKNOWN_CLASS


def usable_instances(file: Path) -> dict[str, Any]:
    """Read the file without the annotations that have a fault."""
    content = load_instances(file)
    image_ids = {image["id"] for image in content["images"]}
    category_ids = {category["id"] for category in content["categories"]}
    rows = [row for row in content["annotations"] if annotation_fault(row, image_ids, category_ids) is None]
    return content | {"annotations": rows}


def _is_id(value: object) -> bool:
    return isinstance(value, int | float) and -(2**63) <= value < 2**63 and value == int(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, int | float) and abs(value) <= _FARTHEST_PX for value in box)
    )
