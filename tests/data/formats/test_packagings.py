"""Whatever the packaging, a set is read alike, or one sentence says what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.annotation_formats import open_image_set, splits_of
from data.image_set import ImageSet
from data.problems import NOTES, OTHER_SIZE, REPEATED_LINE
from tests.data.packagings import (
    CONTENT,
    NAMES,
    ONE_JSON,
    PACKAGINGS,
    UNDIVIDED,
    box_line,
    darknet,
    data_yaml,
    rewritten,
    text,
    voc,
    without,
)
from tests.data.sets import Scene
from utils.errors import UserError

Rows = list[tuple[str, list[tuple[str, tuple[float, ...]]]]]


def content_of(image_set: ImageSet) -> Rows:
    """(stem, [(class, box in fractions)]), sorted."""
    rows = []
    for index in range(len(image_set)):
        record = image_set[index]
        height, width = record.hw
        boxes = np.round(record.boxes / [width, height, width, height], 3).tolist()
        names = [image_set.class_names[label] for label in record.labels]
        rows.append((Path(record.path).stem, sorted(zip(names, map(tuple, boxes), strict=True))))
    return sorted(rows)


def expected(*splits: str) -> Rows:
    def row(scene: Scene) -> tuple[str, list[tuple[str, tuple[float, ...]]]]:
        height, width = scene.hw
        sides = (width, height, width, height)
        return scene.stem, sorted((name, tuple(np.round(np.divide(box, sides), 3))) for name, box in scene.objects)

    return sorted(row(scene) for split in splits for scene in CONTENT[split])


@pytest.mark.parametrize("name", PACKAGINGS)
def test_a_packaging_does_not_change_what_is_read(tmp_path: Path, name: str) -> None:
    path = PACKAGINGS[name](tmp_path / "set")
    assert splits_of(path)[:2] == ("train", "val")
    for split in CONTENT:
        image_set = open_image_set(path, split)
        assert content_of(image_set) == expected(split)
        assert set(image_set.class_names) == {"cat", "dog", "owl"}
        assert image_set.problems.counts.keys() <= {*NOTES, REPEATED_LINE, OTHER_SIZE}
        assert (OTHER_SIZE in image_set.problems.counts) == (name in ("COCO, images resized", "VOC, images resized"))


@pytest.mark.parametrize("name", UNDIVIDED)
def test_a_heap_of_images_is_divided_by_a_fraction(tmp_path: Path, name: str) -> None:
    path = UNDIVIDED[name](tmp_path / "set")
    assert content_of(open_image_set(path, "all")) == expected("train", "val")
    with pytest.raises(
        UserError, match=r"nothing divides its images.*the split 'all' is all of them.*--val-fraction 0\.1"
    ):
        open_image_set(path, "val")
    train, val = (open_image_set(path, split, val_fraction=0.4) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 2)
    assert sorted(content_of(train) + content_of(val)) == expected("train", "val")
    assert "2 images held out for validation" in val.problems.summary()[-1]


@pytest.mark.parametrize("name", ONE_JSON)
def test_one_json_fits_every_split(tmp_path: Path, name: str) -> None:
    path = ONE_JSON[name](tmp_path / "set")
    assert splits_of(path) == ()
    assert content_of(open_image_set(path, "val")) == expected("train", "val")
    assert len(open_image_set(path, "val", val_fraction=0.4)) == 2


def test_what_is_held_out_depends_on_names_only(tmp_path: Path) -> None:
    """Not on the place of the set, nor much on images that are added."""
    for folder in ("a", "b"):
        darknet("classes = 3\ntrain = train.txt\nnames = obj.names\n")(tmp_path / folder)
    first, second = (open_image_set(tmp_path / folder, "val", val_fraction=0.3) for folder in ("a", "b"))
    assert content_of(first) == content_of(second)
    lines = (tmp_path / "b" / "val.txt").read_text()
    with open(tmp_path / "b" / "train.txt", "a") as file:
        file.write(lines)
    more = open_image_set(tmp_path / "b", "val", val_fraction=0.2)
    assert len(more) == 1


def test_a_set_with_a_validation_split_keeps_it(tmp_path: Path) -> None:
    path = voc()(tmp_path)
    assert content_of(open_image_set(path, "val", val_fraction=0.5)) == expected("val")
    assert content_of(open_image_set(path, "train", val_fraction=0.5)) == expected("train")


def test_one_image_cannot_be_divided(tmp_path: Path) -> None:
    without(UNDIVIDED["LabelImg's xml"], "[tv][23].*")(tmp_path / "set")
    without(lambda root: root, "v1.*")(tmp_path / "set")
    with pytest.raises(UserError, match="its 1 images cannot be divided"):
        open_image_set(tmp_path / "set", "val", val_fraction=0.5)


DARKNET = "classes = 3\ntrain = train.txt\nvalid = val.txt\nnames = obj.names\n"
YAML = ("images/{split}/{stem}.png", "labels/{split}/{stem}.txt")
GOOD = "train: images/train\nval: images/val\n"


def lines(change: object) -> object:
    return rewritten(darknet(DARKNET), "obj_*/*.txt", change)  # type: ignore[arg-type]


SENTENCES = {
    "classes from 1": (
        lambda root: darknet(DARKNET, line=lambda label, *box: box_line(label + 1, *box))(root),
        r"v1\.txt: expected classes from 0 to 2, found 1 to 3 and no 0",
    ),
    "a yaml's folder is missing": (
        data_yaml("train: images/train\nval: images/valid\nnames: [cat, dog, owl]\n", *YAML),
        r"data\.yaml: 'val: images/valid' leads to no folder or list in .*correct the line",
    ),
    "a yaml without names": (
        data_yaml(GOOD, *YAML),
        r"data\.yaml: expected 'names', a list of the classes, found None",
    ),
    "a yaml that counts otherwise": (
        data_yaml(GOOD + "nc: 4\nnames: [cat, dog, owl]\n", *YAML),
        r"data\.yaml: nc is 4, but 'names' has 3 names",
    ),
    "a yaml with gaps": (
        data_yaml(GOOD + "names: {0: cat, 2: dog}\n", *YAML),
        r"data\.yaml: expected 'names' numbered from 0 to 1, found 0, 2",
    ),
    "a yaml that is none": (
        data_yaml("train: [\nval: images/val\nnames: a\n", *YAML),
        r"data\.yaml:\d: not valid yaml",
    ),
    "a yaml that explodes": (
        data_yaml("a: &a [x, x]\nb: &b [*a, *a]\nnames: *b\ntrain: images/train\nval: x\n", *YAML),
        r"data\.yaml:2: not valid yaml \(an alias is not read\)",
    ),
    "a yaml that is nested": (
        data_yaml("names: " + "[" * 50_000 + "\ntrain: x\nval: y\n", *YAML),
        r"data\.yaml: not valid yaml \(nested too deep\)",
    ),
    "a .data file with a missing list": (
        darknet(DARKNET.replace("val.txt", "valid.txt")),
        r"obj\.data: names the file valid\.txt, which does not exist",
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, name: str) -> None:
    packaging, message = SENTENCES[name]
    path = packaging(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        open_image_set(path, "val")


NO_OBJECT = {
    "decimal commas": (lambda content: content.replace(b".", b","), "write decimal points"),
    "names for numbers": (lambda content: re.sub(rb"(?m)^\d", b"cat", content), "expected the class's number"),
    "commas": (lambda content: content.replace(b" ", b", "), "blanks between the numbers"),
    "pixels": (lambda content: b"0 40 30 12 20\n", r"found '0 40 30 12 20': pixels\?"),
    "four numbers": (lambda content: b"0 .5 .5 .1\n", "found 4 numbers"),
    "eight numbers": (lambda content: b"0 .5 .5 .1 .1 .2 .2 .3\n", "found 8 numbers"),
}


@pytest.mark.parametrize("name", NO_OBJECT)
def test_malformed_lines_say_what_was_found(tmp_path: Path, name: str) -> None:
    change, message = NO_OBJECT[name]
    path = rewritten(darknet(DARKNET), "obj_*/*.txt", change)(tmp_path / "set")
    image_set = open_image_set(path, "val")
    with pytest.raises(
        UserError, match=rf"none of the 2 images of 'val' has an object; .*{message}.*data\.doctor {path}"
    ):
        image_set.require_objects(str(path))


def test_a_missing_folder_of_labels_is_named(tmp_path: Path) -> None:
    path = without(data_yaml(f"{GOOD}names: [cat, dog, owl]\n", *YAML), "labels")(tmp_path / "set")
    with pytest.raises(UserError, match=r"expected .*labels/val/v1\.txt or .*images/val/v1\.txt, found none"):
        open_image_set(path, "val").require_objects(str(path))


def test_a_near_miss_is_named(tmp_path: Path) -> None:
    path = darknet(DARKNET, lambda path: path.replace(".png", ".jpg"))(tmp_path / "set")
    with pytest.raises(UserError, match=r"obj_val/v1\.jpg \(there is .*obj_val/v1\.png\)"):
        open_image_set(path, "val")
    with pytest.raises(UserError, match=r"Sett: no such file or folder \(there is .*set\)"):
        open_image_set(tmp_path / "Sett", "val")
    with pytest.raises(UserError, match=r"holds no known data set, but .*set does: --data .*set; expected"):
        open_image_set(tmp_path, "val")
    (tmp_path / "other" / "in").mkdir(parents=True)
    (tmp_path / "other" / "a.TXT").touch()
    with pytest.raises(UserError, match=r"holds no known data set \(1 \.txt and 1 folders\); expected"):
        open_image_set(tmp_path / "other", "val")


def test_skipped_files_are_counted_by_their_endings(tmp_path: Path) -> None:
    path = PACKAGINGS["yaml of Roboflow"](tmp_path)
    for name in ("a.heic", "b.HEIC", "notes.txt", ".hidden.raw", "README"):
        text(tmp_path / "valid" / "images" / name, "x")
    assert open_image_set(path, "val").problems.notes() == [
        "2 kinds of files among the images skipped (first: 1 without ending, 2 .heic)"
    ]


def test_a_link_to_a_folder_above_is_walked_once(tmp_path: Path) -> None:
    path = PACKAGINGS["yaml of Roboflow"](tmp_path / "set")
    for name in ("a", "b"):
        (path / "valid" / "images" / name).symlink_to(path / "valid" / "images", target_is_directory=True)
    assert content_of(open_image_set(path, "val")) == expected("val")


def test_two_json_of_one_split_are_not_chosen_between(tmp_path: Path) -> None:
    path = PACKAGINGS["COCO in annotations"](tmp_path / "set")
    for split in ("train", "val"):
        text(path / "annotations" / f"other_{split}2017.json", (path / "annotations" / f"my_{split}.json").read_bytes())
    with pytest.raises(UserError, match="no split 'val'; it has my_train, my_val, other_train2017, other_val2017"):
        open_image_set(path, "val")
    assert content_of(open_image_set(path / "annotations" / "my_val.json", "val")) == expected("val")


def test_two_names_do_not_become_one_image(tmp_path: Path) -> None:
    darknet(DARKNET)(tmp_path / "set")
    text(tmp_path / "set" / "val.txt", "a/obj_val/v1.png\nb/obj_val/v1.png\n")
    image_set = open_image_set(tmp_path / "set", "val")
    assert len(image_set) == 1
    assert "1 missing image skipped (first: b/obj_val/v1.png)" in image_set.problems.summary()[1]


def test_a_path_that_leaves_the_folder_is_said(tmp_path: Path) -> None:
    darknet(DARKNET)(tmp_path / "other")
    darknet(DARKNET)(tmp_path / "set")
    text(tmp_path / "set" / "val.txt", "../other/obj_val/v1.png\nobj_val/v2.png\nobj_train/../obj_val/v1.png\n")
    image_set = open_image_set(tmp_path / "set", "val")
    assert len(image_set) == 3
    assert image_set.problems.summary() == [
        f"1 path read that leads out of the data set's folder (first: {tmp_path / 'set'}/../other/obj_val/v1.png)"
    ]
    data_yaml(GOOD.replace("val: ", "val: ../yaml/") + NAMES, *YAML)(tmp_path / "yaml")
    data_yaml(GOOD.replace("val: ", "val: ../yaml/") + NAMES, *YAML)(tmp_path / "set")
    assert len(open_image_set(tmp_path / "yaml", "val").problems) == 0
    (tmp_path / "set" / "obj.data").unlink()
    (line,) = open_image_set(tmp_path / "set", "val").problems.summary()
    assert line.startswith("1 path read that leads out of the data set's folder (first: ")
    text(tmp_path / "other" / "obj.data", DARKNET.replace("val.txt", "../set/val.txt"))
    assert "leads out of the data set's folder" in open_image_set(tmp_path / "other", "val").problems.summary()[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_not_opened(tmp_path: Path) -> None:
    for packaging, annotation in (("darknet", "obj_val/v1.txt"), ("VOC", "Annotations/v1.xml")):
        root = tmp_path / packaging
        path = PACKAGINGS[packaging](root)
        for name in (annotation, "images/x.png"):
            (root / name).unlink(missing_ok=True)
            (root / name).parent.mkdir(exist_ok=True)
            os.mkfifo(root / name)
        assert len(open_image_set(path, "val")) >= 1


# The sentences that these end with; all others are read alike. Folders without a split `val` are asked to be divided.
SHARED_SENTENCES = {
    "data_mismatch": "classes = 80, but obj.names has 2 names",
    "data_novalid": "--val-fraction",
    "labelimg_voc": "--val-fraction",
    "voc_noimagesets": "--val-fraction",
    "polyonly": "has a segmentation only",
    "y_comma": "blanks between the numbers",
    "y_decimal_comma": "write decimal points",
    "y_named": "expected the class's number",
    "y_nolabels": "found none",
    "y_one_based": "expected classes from 0 to 1",
    "y_pixels": "pixels?",
}


def test_the_shared_cases(shared: Path, tmp_path: Path) -> None:
    generators = shared / "cases"
    run = [sys.executable, "-B"]
    subprocess.run([*run, generators / "base.py", tmp_path / "B", "4", "3"], check=True)
    for name in ("variants", "variants2", "variants3"):
        subprocess.run([*run, generators / f"{name}.py", tmp_path / "B", tmp_path / "C"], check=True)
    base = [objects for _, objects in content_of(open_image_set(tmp_path / "B" / "coco", "val"))]
    other_names = {"voc_gbk": {"红色方框": "red box"}, "voc_ns_case": {"Red Box": "red box"}}
    wrong = {}
    for folder in sorted((tmp_path / "C").iterdir()):
        path = folder / "proj" if folder.name == "images" else folder
        try:
            image_set = open_image_set(path, "val")
            image_set.require_objects(str(path))
        except UserError as error:
            if SHARED_SENTENCES.get(folder.name, "a sentence that is not expected") not in str(error):
                wrong[folder.name] = str(error)
            continue
        renamed = other_names.get(folder.name, {})
        found = [[(renamed.get(n, n), box) for n, box in objects] for _, objects in content_of(image_set)]
        found = found[:: 2 if folder.name == "y_twice" else 1]
        same = [
            len(a) == len(b) and all(x[0] == y[0] for x, y in zip(sorted(a), sorted(b), strict=True))
            for a, b in zip(found, base, strict=True)
        ]
        near = all(same) and all(
            np.allclose(x[1], y[1], atol=0.011)
            for a, b in zip(found, base, strict=True)
            for x, y in zip(sorted(a), sorted(b), strict=True)
        )
        if folder.name in SHARED_SENTENCES or not near:
            wrong[folder.name] = f"{found[0]} for {base[0]}"
    assert wrong == {}
