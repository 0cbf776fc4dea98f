"""One set of images and boxes, packed as the tools and hands of this world would.

A packaging writes the splits of `CONTENT` into a folder and returns what to type behind --data. `PACKAGINGS` have the
splits train and val; `UNDIVIDED` have all images in one heap.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from tests.data.sets import CLASSES, Scene, turn, voc_object, write_image

CONTENT = {
    "train": (
        Scene(stem="t1", objects=[("cat", (8, 6, 40, 30)), ("owl", (40, 12, 80, 60))]),
        Scene(stem="t2", objects=[]),
        Scene(stem="t3", objects=[("dog", (16, 15, 32, 45))], hw=(60, 64)),
    ),
    "val": (
        Scene(stem="v1", objects=[("dog", (8, 6, 40, 30)), ("cat", (40, 12, 80, 60))]),
        Scene(stem="v2", objects=[("owl", (10, 20, 30, 50))], hw=(64, 60)),
    ),
}
Packaging = Callable[[Path], Path]


def everything() -> Iterator[tuple[str, Scene]]:
    yield from ((split, scene) for split, scenes in CONTENT.items() for scene in scenes)


def image(path: Path, scene: Scene) -> None:
    write_image(path, scene.hw, int(scene.stem[1]) + 10 * (scene.stem[0] == "v"))


def text(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# --- YOLO's label files ----------------------------------------------------------------------------------------


def box_line(label: int, x0: float, y0: float, x1: float, y1: float) -> str:
    return f"{label} {(x0 + x1) / 2:.7f} {(y0 + y1) / 2:.7f} {x1 - x0:.7f} {y1 - y0:.7f}"


def polygon_line(label: int, x0: float, y0: float, x1: float, y1: float) -> str:
    """A polygon with five corners: 11 numbers."""
    return f"{label} {x0} {y0} {x1} {y0} {x1} {y1} {(x0 + x1) / 2} {y1} {x0} {y1}"


def obb_line(label: int, x0: float, y0: float, x1: float, y1: float) -> str:
    return f"{label} {x0} {y0} {x1} {y0} {x1} {y1} {x0} {y1}"


def labels(scene: Scene, line: Callable[..., str] = box_line) -> str:
    height, width = scene.hw
    rows = [
        line(CLASSES.index(name), *np.divide(box, (width, height, width, height)).tolist())
        for name, box in scene.objects
    ]
    return "".join(f"{row}\n" for row in rows)


def yolo_images(
    root: Path, image_at: str, label_at: str, line: Callable[..., str] = box_line, valid: str = "val"
) -> dict[str, list[str]]:
    """Write images and labels to places such as '{split}/images/{stem}'. Returns the images' paths by split."""
    listed: dict[str, list[str]] = {"train": [], "val": []}
    for split, scene in everything():
        names = {"split": valid if split == "val" else split, "stem": scene.stem}
        path = image_at.format(**names)
        listed[split].append(path)
        image(root / path, scene)
        if scene.objects:
            text(root / label_at.format(**names), labels(scene, line))
    return listed


def data_yaml(
    content: str, image_at: str, label_at: str, valid: str = "val", **options: Callable[..., str]
) -> Packaging:
    def write(root: Path) -> Path:
        yolo_images(root, image_at, label_at, valid=valid, **options)
        text(root / "data.yaml", content)
        return root

    return write


BY_SPLIT = ("images/{split}/{stem}.png", "labels/{split}/{stem}.txt")
ROBOFLOW = ("{split}/images/{stem}.png", "{split}/labels/{stem}.txt")
NAMES = "names: [cat, dog, owl]\n"


def yaml_file_of_lists(root: Path) -> Path:
    for split, paths in yolo_images(root, *BY_SPLIT).items():
        text(root / f"{split}.txt", "".join(f"./{path}\r\n" for path in paths))
    text(root / "mine.yml", "train: train.txt\nval: val.txt\nnames:\n  0: cat\n  1: dog\n  2: owl\n")
    return root / "mine.yml"


def yaml_of_cvat(root: Path) -> Path:
    for split, paths in yolo_images(root, *BY_SPLIT).items():
        text(root / f"{split}.txt", "".join(f"data/{path}\n" for path in paths))
    text(root / "data.yaml", f"path: .\ntrain: train.txt\nval: val.txt\n{NAMES}")
    return root


def keypoints(label: int, *box: float) -> str:
    return box_line(label, *box) + " 0.1 0.2 2 0.3 0.4 1"


def folders_without_yaml(image_at: str, label_at: str, names: str = "classes.txt", valid: str = "val") -> Packaging:
    def write(root: Path) -> Path:
        yolo_images(root, image_at, label_at, valid=valid)
        text(root / names, "cat\ndog\nowl\n")
        return root

    return write


# --- darknet ---------------------------------------------------------------------------------------------------


def darknet(
    data: str, listed: Callable[[str], str] = str, ending: str = "\n", line: Callable[..., str] = box_line
) -> Packaging:
    def write(root: Path) -> Path:
        for split, paths in yolo_images(root, "obj_{split}/{stem}.png", "obj_{split}/{stem}.txt", line).items():
            text(root / f"{split}.txt", "".join(listed(path) + ending for path in paths))
        text(root / "obj.names", "cat\ndog\nowl\n")
        text(root / "obj.data", data)
        return root

    return write


PLAIN = "classes = 3\ntrain = train.txt\nvalid = val.txt\nnames = obj.names\n"


def our_own_save_txt(label: int, *box: float) -> str:
    return box_line(label, *box) + " 0.874"


def rewritten(packaging: Packaging, pattern: str, change: Callable[[bytes], bytes]) -> Packaging:
    """Change the bytes of the files that match the pattern."""

    def write(root: Path) -> Path:
        path = packaging(root)
        for file in root.rglob(pattern):
            file.write_bytes(change(file.read_bytes()))
        return path

    return write


# --- COCO ------------------------------------------------------------------------------------------------------


def instances(split: str, name: str = "{stem}.png", splits: tuple[str, ...] = ()) -> dict[str, list[dict[str, object]]]:
    images, annotations = [], []
    for number, (_, scene) in enumerate((pair for pair in everything() if pair[0] in (splits or (split,))), 1):
        (height, width) = scene.hw
        images.append({"id": number, "file_name": name.format(stem=scene.stem), "height": height, "width": width})
        for kind, (x0, y0, x1, y1) in scene.objects:
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": CLASSES.index(kind) + 1}
            annotations.append(row | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0})
    categories = [{"id": number, "name": kind, "supercategory": "pets"} for number, kind in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco(
    image_at: str,
    json_at: str,
    name: str = "{stem}.png",
    valid: str = "val",
    change: Callable[[dict[str, list[dict[str, object]]]], object] = lambda content: None,
) -> Packaging:
    def write(root: Path) -> Path:
        for split, scene in everything():
            image(root / image_at.format(split=valid if split == "val" else split, stem=scene.stem), scene)
        for split in CONTENT:
            content = instances(split, name)
            change(content)
            text(root / json_at.format(split=valid if split == "val" else split), json.dumps(content))
        return root

    return write


def with_supercategory(content: dict[str, list[dict[str, object]]]) -> None:
    content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})


def in_quotes(content: dict[str, list[dict[str, object]]]) -> None:
    for row in content["annotations"]:
        row |= {"image_id": str(row["image_id"]), "category_id": str(row["category_id"]), "area": None}
    for row in content["images"]:
        row |= {"height": f"{row['height']}", "width": float(str(row["width"]))}


def one_json(json_at: str, image_at: str, name: str = "{stem}.png") -> Packaging:
    def write(root: Path) -> Path:
        for _, scene in everything():
            image(root / image_at.format(stem=scene.stem), scene)
        text(root / json_at, json.dumps(instances("", name, ("train", "val"))))
        return root

    return write


# --- VOC -------------------------------------------------------------------------------------------------------


def xml(scene: Scene, filename: str = "", scale: float = 1) -> str:
    height, width = (round(side * scale) for side in scene.hw)
    objects = "".join(voc_object(name, tuple(side * scale for side in box)) for name, box in scene.objects)  # type: ignore[arg-type]
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename or scene.stem + '.png'}</filename>{size}{objects}</annotation>"


def voc(
    image_at: str = "JPEGImages/{stem}.png",
    xml_at: str = "Annotations/{stem}.xml",
    line: str = "{stem}",
    valid: str = "val",
    scale: float = 1,
    lists: bool = True,
) -> Packaging:
    def write(root: Path) -> Path:
        lines: dict[str, str] = dict.fromkeys(CONTENT, "")
        for split, scene in everything():
            names = {"split": valid if split == "val" else split, "stem": scene.stem}
            image(root / image_at.format(**names), scene)
            text(root / xml_at.format(**names), xml(scene, scale=scale))
            lines[split] += line.format(**names) + "\n"
        for split, content in lines.items() if lists else ():
            text(root / "ImageSets" / "Main" / f"{split}.txt", content)
        return root

    return write


def with_upper_case_images(root: Path) -> Path:
    voc()(root)
    for path in (root / "JPEGImages").iterdir():
        path.rename(path.with_suffix(".PNG"))
    return root


def with_turned_images(root: Path) -> Path:
    """Stored as they were annotated, with an EXIF tag that turns them."""
    voc()(root)
    for path in (root / "JPEGImages").iterdir():
        turn(path)
    return root


def halved(packaging: Packaging) -> Packaging:
    """Images resized after they were annotated."""

    def write(root: Path) -> Path:
        path = packaging(root)
        for file in root.rglob("*.png"):
            whole = cv2.imread(str(file))
            cv2.imwrite(str(file), cv2.resize(whole, (whole.shape[1] // 2, whole.shape[0] // 2)))
        return path

    return write


def declared(encoding: str) -> Callable[[bytes], bytes]:
    return lambda content: f'<?xml version="1.0" encoding="{encoding}"?>{content.decode()}'.encode(encoding)


# --- tables ----------------------------------------------------------------------------------------------------


def table(
    image_at: str, csv_at: str, header: str, row: str, *, relative: bool = False, valid: str = "val"
) -> Packaging:
    """row: of the fields file, stem, name, x0, y0, x1, y1, w, h. An image without objects has a row without a box."""

    def write(root: Path) -> Path:
        rows: dict[Path, list[str]] = {}
        for split, scene in everything():
            names = {"split": valid if split == "val" else split, "stem": scene.stem}
            image(root / image_at.format(**names), scene)
            (height, width) = scene.hw
            scale = (width, height, width, height) if relative else (1, 1, 1, 1)
            for name, box in scene.objects or [("", None)]:
                sides = (
                    ("",) * 4 if box is None else tuple(f"{side / by:.6f}" for side, by in zip(box, scale, strict=True))
                )
                fields = dict(zip(("x0", "y0", "x1", "y1"), sides, strict=True), name=name, w=width, h=height)
                line = row.format(file=f"{scene.stem}.png", stem=scene.stem, **fields)
                rows.setdefault(root / csv_at.format(**names), []).append(line)
        for file, lines in rows.items():
            text(file, "\n".join([header, *lines, ""]))
        return root

    return write


TENSORFLOW = ("filename,width,height,class,xmin,ymin,xmax,ymax", "{file},{w},{h},{name},{x0},{y0},{x1},{y1}")
OPEN_IMAGES = ("ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf", "{stem},{name},{x0},{x1},{y0},{y1},0")

PACKAGINGS: dict[str, Packaging] = {
    # Ultralytics, Roboflow
    "yaml": data_yaml(f"path: .\ntrain: images/train\nval: images/val\ntest:\nnc: 3\n{NAMES}", *BY_SPLIT),
    "yaml of another machine": data_yaml(
        f"path: /content/datasets/pets\ntrain: images/train\nval: images/val\n{NAMES}", *BY_SPLIT
    ),
    "yaml with absolute paths": data_yaml(
        f"train: /home/me/pets/train/images\nval: /home/me/pets/valid/images\n{NAMES}", *ROBOFLOW, "valid"
    ),
    "yaml of Windows": data_yaml(
        f"train: 'C:\\pets\\train\\images'\nval: 'C:\\pets\\valid\\images'\n{NAMES}", *ROBOFLOW, "valid"
    ),
    "yaml of Roboflow": data_yaml(
        f"train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 3\n{NAMES}", *ROBOFLOW, "valid"
    ),
    "yaml with folders above images": data_yaml(f"train: train\nval: valid\n{NAMES}", *ROBOFLOW, "valid"),
    "yaml with a list of folders": data_yaml(f"train: [images/train]\nval:\n- images/val\n{NAMES}", *BY_SPLIT),
    "yaml with numbered names": data_yaml(
        "train: images/train\nval: images/val\nnames: {0: cat, 2: owl, 1: dog}\n", *BY_SPLIT
    ),
    "yaml file of lists": yaml_file_of_lists,
    "yaml of CVAT": yaml_of_cvat,
    "yaml with polygons": data_yaml(f"train: images/train\nval: images/val\n{NAMES}", *BY_SPLIT, line=polygon_line),
    "yaml with rotated boxes": data_yaml(f"train: images/train\nval: images/val\n{NAMES}", *BY_SPLIT, line=obb_line),
    "yaml with keypoints": data_yaml(
        f"train: images/train\nval: images/val\nkpt_shape: [2, 3]\n{NAMES}", *BY_SPLIT, line=keypoints
    ),
    "yaml, images resized": halved(data_yaml(f"train: images/train\nval: images/val\n{NAMES}", *BY_SPLIT)),
    "images and labels by split": folders_without_yaml(*BY_SPLIT),
    "splits with images and labels": folders_without_yaml(*ROBOFLOW, "valid/classes.txt", "valid"),
    "splits with both in one": folders_without_yaml("{split}/{stem}.png", "{split}/{stem}.txt", valid="valid"),
    # darknet
    "darknet": darknet(PLAIN),
    "darknet with val": darknet(PLAIN.replace("valid", "val")),
    "darknet with quotes and comments": darknet(
        "classes=3 # pets\ntrain = 'train.txt'\nvalid = \"val.txt\" ; list\nnames = obj.names\n"
    ),
    "darknet with folders": darknet("classes = 3\ntrain = obj_train\nvalid = obj_val/\nnames = obj.names\n"),
    "darknet of CVAT": darknet(PLAIN.replace("= t", "= data/t").replace("= v", "= data/v"), "data/{}".format),
    "darknet of Windows": darknet(PLAIN, lambda path: f"C:\\Users\\me\\{path}".replace("/", "\\"), "\r\n"),
    "darknet with quoted names": darknet(PLAIN, '"{}"'.format),
    "darknet with detections of ours": darknet(PLAIN, line=our_own_save_txt),
    "darknet in UTF-16": rewritten(darknet(PLAIN), "*.txt", lambda content: content.decode().encode("utf-16")),
    "darknet with each line twice": rewritten(darknet(PLAIN), "obj_*/*.txt", lambda content: content * 2),
    "darknet with names in another case": darknet(PLAIN, lambda path: path.replace(".png", ".PNG")),
    # COCO
    "COCO": coco("{split}/{stem}.png", "annotations/instances_{split}2017.json"),
    "COCO of CVAT with subsets": coco(
        "images/{stem}.png", "annotations/instances_{split}.json", valid="Validation", change=in_quotes
    ),
    "COCO of Roboflow": coco(
        "{split}/{stem}.png", "{split}/_annotations.coco.json", valid="valid", change=with_supercategory
    ),
    "COCO with short names": coco("images/{stem}.png", "{split}.json"),
    "COCO in annotations": coco("{split}/{stem}.png", "annotations/my_{split}.json"),
    "COCO with paths of another machine": coco(
        "images/{stem}.png", "annotations/instances_{split}.json", name="/home/me/images/{stem}.png"
    ),
    "COCO of Windows": coco("images/{stem}.png", "annotations/instances_{split}.json", name="images\\{stem}.png"),
    "COCO with URLs": coco("images/{stem}.png", "{split}.json", name="https://x.org/a%20b/{stem}.png"),
    "COCO, images resized": halved(coco("{split}/{stem}.png", "annotations/instances_{split}.json")),
    # VOC
    "VOC": voc(),
    "VOC of CVAT with sub-folders": voc("JPEGImages/day 1/{stem}.png", "Annotations/day 1/{stem}.xml", "day 1/{stem}"),
    "VOC with endings": voc(line="{stem}.png"),
    "VOC with full paths": voc(line="/home/me/VOC2007/JPEGImages/{stem}.png"),
    "VOC with flags": voc(line="{stem}  1"),
    "VOC with quotes": voc(line='"{stem}" 1'),
    "VOC, .PNG": with_upper_case_images,
    "VOC of Roboflow": voc("{split}/{stem}.png", "{split}/{stem}.xml", valid="valid", lists=False),
    "VOC, images resized": voc(scale=2),
    "VOC, images turned": with_turned_images,
    "VOC in GBK": rewritten(voc(), "*.xml", declared("GBK")),
    "VOC in UTF-16": rewritten(voc(), "*.xml", declared("utf-16")),
    # tables
    "csv of Roboflow": table("{split}/{stem}.png", "{split}/_annotations.csv", *TENSORFLOW, valid="valid"),
    "csv by split": table("images/{stem}.png", "{split}.csv", *TENSORFLOW),
    "csv of Open Images": table("{split}/{stem}.png", "{split}-boxes.csv", *OPEN_IMAGES, relative=True),
    "VOC without sizes": rewritten(voc(), "*.xml", lambda content: re.sub(rb"<size>.*</size>", b"", content)),
}

UNDIVIDED: dict[str, Packaging] = {
    "LabelImg's xml": voc("{stem}.png", "{stem}.xml", lists=False),
    "VOC without lists": voc(lists=False),
    "VOC of Kaggle": voc("images/{stem}.png", "annotations/{stem}.xml", lists=False),
    "LabelImg's txt": folders_without_yaml("{stem}.png", "{stem}.txt"),
    "Label Studio's YOLO": folders_without_yaml("images/{stem}.png", "labels/{stem}.txt"),
}
ONE_JSON: dict[str, Packaging] = {
    "CVAT": one_json("annotations/instances_default.json", "images/day 1/cam/{stem}.png", "day 1/cam/{stem}.png"),
    "Label Studio": one_json("result.json", "images/{stem}.png", "images\\{stem}.png"),
    "FiftyOne": one_json("labels.json", "data/{stem}.png"),
    "one csv": table("{stem}.png", "labels.csv", "image,score,label,x1,y1,x2,y2", "{file},,{name},{x0},{y0},{x1},{y1}"),
    "images in a folder of any name": one_json("my.json", "photos/{stem}.png"),
}


def without(packaging: Packaging, pattern: str) -> Packaging:
    """Delete the files and folders that match the pattern."""

    def write(root: Path) -> Path:
        path = packaging(root)
        for found in list(root.rglob(pattern)):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
        return path

    return write
