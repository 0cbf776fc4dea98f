"""Small data sets, one scene list written in each of the three formats."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data.image_set import ImageSet, Record, pack
from data.problems import Problems

CLASSES = ("cat", "dog", "owl")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """objects: (class name, xyxy in px). The image is plain noise."""

    stem: str
    objects: Sequence[tuple[str, tuple[float, float, float, float]]]
    hw: tuple[int, int] = (60, 80)


SCENES = (
    Scene(stem="a", objects=[("cat", (8, 6, 40, 30)), ("owl", (40, 12, 80, 60))]),
    Scene(stem="b", objects=[]),
    Scene(stem="c", objects=[("dog", (16, 15, 32, 45))], hw=(60, 64)),
)


def write_image(path: Path, hw: tuple[int, int], seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), image)


def exif(orientation: int) -> bytes:
    """Of that one tag."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def with_orientation(content: bytes, orientation: int, at: int = 33) -> bytes:
    """A JPEG or PNG file with an EXIF tag put in. at: where in a PNG; by default after IHDR."""
    tiff = exif(orientation)
    if content[:2] == b"\xff\xd8":
        segment = b"Exif\0\0" + tiff
        return content[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + content[2:]
    chunk = struct.pack(">I", len(tiff)) + b"eXIf" + tiff + struct.pack(">I", zlib.crc32(b"eXIf" + tiff))
    return content[:at] + chunk + content[at:]


def turn(path: Path, orientation: int = 6) -> None:
    """Give an image an EXIF tag that lays it on its side."""
    path.write_bytes(with_orientation(path.read_bytes(), orientation))


def write_coco(root: Path, split: str, scenes: Sequence[Scene] = SCENES) -> Path:
    """Category ids 7, 3 and 9 in the file, so that their order matters. -> the json file."""
    ids = {"owl": 9, "cat": 3, "dog": 7}
    images, annotations = [], []
    for number, scene in enumerate(scenes, start=1):
        write_image(root / split / f"{scene.stem}.png", scene.hw, number)
        height, width = scene.hw
        images.append({"id": number, "file_name": f"{scene.stem}.png", "height": height, "width": width})
        for name, (left, top, right, bottom) in scene.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": ids[name],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def voc_object(name: str, box: tuple[float, float, float, float], difficult: int = 0) -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def write_voc(root: Path, split: str, scenes: Sequence[Scene] = SCENES) -> Path:
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes, start=1):
        write_image(root / "JPEGImages" / f"{scene.stem}.png", scene.hw, number)
        objects = "".join(voc_object(name, box) for name, box in scene.objects)
        (root / "Annotations" / f"{scene.stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    lines = "\n".join(scene.stem for scene in scenes)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines + "\n")
    return root


def write_darknet(root: Path, split: str, scenes: Sequence[Scene] = SCENES) -> Path:
    """-> the .data file, whose `train` or `valid` lists images relative to it."""
    (root / "labels").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(scenes, start=1):
        write_image(root / "images" / f"{scene.stem}.png", scene.hw, number)
        lines.append(f"images/{scene.stem}.png")
        rows = []
        for name, (left, top, right, bottom) in scene.objects:
            height, width = scene.hw
            centre = ((left + right) / 2 / width, (top + bottom) / 2 / height)
            sides = ((right - left) / width, (bottom - top) / height)
            rows.append(" ".join(map(str, (CLASSES.index(name), *centre, *sides))))
        if rows:
            (root / "labels" / f"{scene.stem}.txt").write_text("\n".join(rows) + "\n")
    (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (root / "set.names").write_text("\n".join(CLASSES) + "\n")
    key = {"train": "train", "val": "valid"}[split]
    file = root / "set.data"
    before = file.read_text() if file.exists() else "classes = 3\nnames = set.names\n"
    file.write_text(f"{before}{key} = {split}.txt\n")
    return file


def noise_image_set(folder: Path, count: int, hw: tuple[int, int] = (60, 80)) -> ImageSet:
    """`count` noise images with 0, 1 or 2 objects; every third has none."""
    records = []
    for i in range(count):
        path = folder / f"{i:03d}.png"
        write_image(path, hw, seed=i)
        boxes = np.array([[10, 10, 40, 40], [30, 5, 70, 50]], np.float32)[: i % 3]
        records.append(
            Record(
                path=str(path),
                image_id=100 + i,
                boxes=boxes,
                labels=np.arange(len(boxes)),
                is_crowd=np.zeros(len(boxes), bool),
                hw=hw,
            )
        )
    return pack(
        records,
        name="noise",
        split="train",
        class_names=CLASSES,
        category_ids=(1, 2, 3),
        problems=Problems(),
        source=str(folder),
    )
