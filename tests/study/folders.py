"""Folders of images as readers have them."""

from __future__ import annotations

from pathlib import Path

from tests.data.sets import voc_object, write_image

OBJECT = ("cat", (8.0, 6.0, 40.0, 30.0))


def voc(root: Path, images: int, *, lists: dict[str, range] | None = None) -> Path:
    """A VOC folder as LabelImg leaves it, or with lists of images by split."""
    for number in range(images):
        stem = f"image{number}"
        write_image(root / "JPEGImages" / f"{stem}.jpg", (60, 80), number)
        annotation = root / "Annotations" / f"{stem}.xml"
        annotation.parent.mkdir(exist_ok=True)
        size = "<size><width>80</width><height>60</height><depth>3</depth></size>"
        annotation.write_text(f"<annotation><filename>{stem}.jpg</filename>{size}{voc_object(*OBJECT)}</annotation>")
    for split, numbers in (lists or {}).items():
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"image{number}\n" for number in numbers))
    return root


def roboflow(root: Path, **counts: int) -> Path:
    """A folder as Roboflow's download, with these numbers of images by split."""
    for split, count in counts.items():
        for number in range(count):
            stem = f"{split}{number}_jpg.rf.{number:032x}"
            write_image(root / split / "images" / f"{stem}.jpg", (60, 80), number)
            label = root / split / "labels" / f"{stem}.txt"
            label.parent.mkdir(exist_ok=True)
            label.write_text("0 0.5 0.5 0.25 0.25\n")
    paths = {"train": "train", "val": "valid", "test": "test"}
    lines = [f"{key}: ../{split}/images" for key, split in paths.items() if split in counts]
    (root / "data.yaml").write_text("\n".join([*lines, "nc: 1", "names: ['cat']", ""]))
    return root
