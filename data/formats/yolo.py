"""Reader of YOLO folders: Ultralytics' and Roboflow's data.yaml, or images and label files in the usual folders.

Without a data.yaml: images/ and labels/ with sub-folders train, val and test or without; train/images, valid/images; or
LabelImg's images and labels in one folder; each with the class names in classes.txt.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from data.formats.darknet import listed_images
from data.formats.image_finder import find_path, is_image_name, note_if_outside
from data.formats.label_files import LabelFiles
from data.formats.split_names import SPELLED, WHOLE, ordered, split_folders
from data.image_set import ImageSet, pack
from data.problems import Problems
from utils.errors import UserError
from utils.listing import decoded, read_bounded, read_lines

EXPECTED = "a YOLO folder (data.yaml, or images and labels with classes.txt)"

_MOST_YAML_BYTES = 1 << 18
_YAML = (".yaml", ".yml")
_NAMES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels", "predefined_classes.txt")
_PEEKED = 1000  # names of a folder that are looked at, to know the format


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Folders and lists with the images of each split. file: the one that defines them, and names the classes.

    roots: what the paths are relative to. names: None where `file` is a list of them. keypoints: of `LabelFiles`.
    """

    file: Path
    roots: tuple[Path, ...]
    splits: dict[str, list[str]]
    names: list[str] | None
    keypoints: bool = False


class _Strings(yaml.BaseLoader):  # type: ignore[misc]
    """Loader of lists, dictionaries and strings only: `no` is a class name. Without aliases, which can explode."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "an alias is not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def holds(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() in _YAML
    return _yaml_in(path) is not None or _layout_of_folder(path) is not None


def splits(path: Path) -> tuple[str, ...]:
    return ordered(_layout(path).splits)


def has_split(path: Path, split: str) -> bool:
    return split in _layout(path).splits


def read(path: Path, split: str) -> ImageSet:
    """Read a split. An image without a label file has no objects; an image id is its number in the list, from 1.

    Raises UserError if a path of the yaml leads nowhere or no image is usable.
    """
    layout = _layout(path)
    problems = Problems()
    sources = [_source(layout, split, value) for value in layout.splits[split]]
    for source in sources:
        note_if_outside(source, layout.roots, problems)
    names = read_lines(layout.file) if layout.names is None else layout.names
    folders = [*layout.roots, *(source.parent for source in sources if source.is_file())]
    images = listed_images(sources, folders, layout.roots[0], problems)
    return pack(
        LabelFiles(names, problems, keypoints=layout.keypoints).records(images),
        name=os.path.basename(os.path.abspath(layout.file.parent)),
        split=split,
        class_names=names,
        category_ids=range(len(names)),
        problems=problems,
        source=", ".join(map(str, sources)),
        classes_source=str(layout.file),
    )


def _layout(path: Path) -> _Layout:
    file = path if path.is_file() else _yaml_in(path)
    layout = _layout_of_folder(path) if file is None else _layout_of_yaml(file)
    assert layout is not None, "a path that `holds` does not accept"
    return layout


def _yaml_in(folder: Path) -> Path | None:
    """Return the folder's data.yaml, or the first yaml file that names classes and splits."""
    files = sorted((file for ending in _YAML for file in folder.glob(f"*{ending}")), key=lambda f: f.stem != "data")
    return next((file for file in files[:_PEEKED] if file.is_file() and _names_splits(file)), None)


def _names_splits(file: Path) -> bool:
    try:
        lines = decoded(read_bounded(file, _MOST_YAML_BYTES)).splitlines()
    except (UserError, UnicodeDecodeError):
        return file.stem == "data"
    keys = {line.partition(":")[0].strip("\"' ") for line in lines if line[:1] not in " #-"}
    return bool(keys & SPELLED.keys()) and (file.stem == "data" or bool(keys & {"names", "nc"}))


def _layout_of_yaml(file: Path) -> _Layout:
    content = _load(file)
    path = content.get("path") or ""
    if not isinstance(path, str):
        raise UserError(f"{file}: expected a folder as 'path', found {str(path)[:60]}.")
    found = find_path(path, (file.parent, Path(), Path("datasets"))) if path else None
    values = {SPELLED[key]: value for key, value in content.items() if key in SPELLED and value}
    lists = {split: value if isinstance(value, list) else [value] for split, value in values.items()}
    odd = [item for items in lists.values() for item in items if not isinstance(item, str)]
    if odd or not lists:
        shown = str(odd[0])[:60] if odd else "none"
        raise UserError(f"{file}: expected a folder or a list file for 'train' and 'val', found {shown}.")
    roots = tuple(dict.fromkeys([*([found] if found is not None and found.is_dir() else []), file.parent]))
    if "test" in lists and not any(find_path(value, (*roots, Path())) for value in lists["test"]):
        del lists["test"]  # Roboflow lists it in any case
    keypoints = "kpt_shape" in content
    return _Layout(file=file, roots=roots, splits=lists, names=_names(file, content), keypoints=keypoints)


def _load(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(decoded(read_bounded(file, _MOST_YAML_BYTES)), Loader=_Strings)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: not valid yaml ({error.problem}).") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise UserError(f"{file}: not valid yaml ({reason}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected 'train:', 'val:' and 'names:', as in Ultralytics' data.yaml.")
    return content


def _names(file: Path, content: dict[str, Any]) -> list[str]:
    """Return the classes: a list, a dictionary of numbers, or as many as `nc` says."""
    names, count = content.get("names"), content.get("nc")
    if isinstance(names, dict):
        numbers = {key: int(key) for key in names if str(key).isdecimal() and len(key) < 7}
        if len(numbers) < len(names) or set(numbers.values()) != set(range(len(names))):
            found = ", ".join(map(str, islice(names, 5)))
            raise UserError(f"{file}: expected 'names' numbered from 0 to {len(names) - 1}, found {found}.")
        names = [names[key] for key in sorted(names, key=int)]
    if names is None and str(count).isdecimal() and 0 < int(str(count)[:7]) < 100_000:
        return [f"class {label}" for label in range(int(str(count)))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: expected 'names', a list of the classes, found {str(names)[:60]}.")
    if count is not None and str(count) != str(len(names)):
        raise UserError(f"{file}: nc is {count}, but 'names' has {len(names)} names: correct one of them.")
    return names


def _source(layout: _Layout, split: str, value: str) -> Path:
    """Return the folder or list of a split; an image folder above labels, such as `train` of `train/images`, too."""
    found = find_path(value, (*layout.roots, Path()))
    if found is None:
        searched = ", ".join(map(str, layout.roots))
        leads = f"'{split}: {value[:200]}' leads to no folder or list in {searched}"
        raise UserError(f"{layout.file}: {leads}: correct the line, or 'path:'.")
    inner = found / "images"
    return inner if inner.is_dir() and (found / "labels").is_dir() else found


def _layout_of_folder(root: Path) -> _Layout | None:
    """Find the usual folders without a yaml; None without class names."""
    places = (root, root / "labels", *split_folders(root).values())
    names = next((place / name for place in places for name in _NAMES if (place / name).is_file()), None)
    found = {} if names is None else {split: [str(path)] for split, path in _splits_of_folder(root).items()}
    return _Layout(file=names, roots=(root,), splits=found, names=None) if names and found else None


def _splits_of_folder(root: Path) -> dict[str, Path]:
    """Return split -> its folder or list of images."""
    images = root / "images"
    if images.is_dir() and (root / "labels").is_dir():
        return split_folders(images) or {WHOLE: images}
    if folders := split_folders(root):
        return {split: inner if (inner := each / "images").is_dir() else each for split, each in folders.items()}
    if lists := {split: file for name, split in SPELLED.items() if (file := root / f"{name}.txt").is_file()}:
        return lists
    has_images = any(is_image_name(entry.name) for entry in islice(os.scandir(root), _PEEKED))
    return {WHOLE: root} if has_images else {}
