from pathlib import Path

import numpy as np
import pytest

import data.annotation_formats
from data.annotation_formats import open_image_set, splits_of
from data.image_set import ImageSet, Record, pack
from data.problems import Problems
from tests.data.sets import SCENES, Scene, write_coco, write_darknet, write_image, write_voc
from utils.errors import UserError

NO_OBJECT = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "is_crowd": np.zeros(0, bool)}
WRITERS = {"coco": write_coco, "voc": write_voc, "darknet": write_darknet}


def root_of(written: Path) -> Path:
    return written.parent.parent if written.suffix == ".json" else written


@pytest.mark.parametrize("style", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, style: str) -> None:
    image_set = open_image_set(root_of(WRITERS[style](tmp_path / "set", "train")), "train")
    assert image_set.class_names == ("cat", "dog", "owl")
    assert image_set.split == "train"
    assert image_set.problems.summary() == []
    assert len(image_set) == len(SCENES)
    for record, scene in zip([image_set[i] for i in range(len(SCENES))], SCENES, strict=True):
        assert Path(record.path).stem == scene.stem
        assert record.hw == scene.hw
        expected = np.array([box for _, box in scene.objects], np.float32).reshape(-1, 4)
        np.testing.assert_allclose(record.boxes, expected, atol=1e-4)
        assert [image_set.class_names[label] for label in record.labels] == [name for name, _ in scene.objects]
        assert record.boxes.dtype == np.float32
        assert record.labels.dtype == np.int64
        assert not record.is_crowd.any()


@pytest.mark.parametrize("style", WRITERS)
def test_ground_truth_names_the_same_objects(tmp_path: Path, style: str) -> None:
    image_set = open_image_set(root_of(WRITERS[style](tmp_path / "set", "train")), "train")
    ground_truth = image_set.ground_truth()
    assert [image["id"] for image in ground_truth["images"]] == list(image_set.image_ids)
    assert {(image["file_name"], image["height"], image["width"]) for image in ground_truth["images"]} == {
        (f"{scene.stem}.png", *scene.hw) for scene in SCENES
    }
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    found = sorted((names[each["category_id"]], *np.round(each["bbox"], 3)) for each in ground_truth["annotations"])
    assert found == [("cat", 8, 6, 32, 24), ("dog", 16, 15, 16, 30), ("owl", 40, 12, 40, 48)]
    assert [each["id"] for each in ground_truth["annotations"]] == [1, 2, 3]
    assert names == dict(zip(image_set.category_ids, image_set.class_names, strict=True))


@pytest.mark.parametrize("style", WRITERS)
def test_absent_split_lists_those_there_are(tmp_path: Path, style: str) -> None:
    root = root_of(WRITERS[style](tmp_path / "set", "train"))
    with pytest.raises(UserError, match=r"no split 'val'; it has train\."):
        open_image_set(root, "val")


@pytest.mark.parametrize("style", WRITERS)
def test_two_splits(tmp_path: Path, style: str) -> None:
    WRITERS[style](tmp_path / "set", "train")
    root = root_of(WRITERS[style](tmp_path / "set", "val", SCENES[2:]))
    assert len(open_image_set(root, "train")) == 3
    assert len(open_image_set(root, "val")) == 1
    assert open_image_set(root, "val").class_names == ("cat", "dog", "owl")


@pytest.mark.parametrize("style", WRITERS)
def test_images_in_two_splits_are_counted(tmp_path: Path, style: str) -> None:
    WRITERS[style](tmp_path / "set", "train")
    root = root_of(WRITERS[style](tmp_path / "set", "val", SCENES[2:]))
    train, val = open_image_set(root, "train"), open_image_set(root, "val")
    shared = 0 if style == "coco" else 1  # each COCO split has its own folder here
    assert len(np.intersect1d(train.paths, val.paths)) == shared


def test_a_lone_json_shares_all_its_images(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train").rename(tmp_path / "train" / "labels.json")
    assert open_image_set(file, "train").paths.tolist() == open_image_set(file, "val").paths.tolist()


class Folder:
    """A format of one file: the sub-folders are the splits, their images have no objects."""

    EXPECTED = "a folder of folders of .bmp images"

    def holds(self, path: Path) -> bool:
        return any(path.glob("*/*.bmp"))

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(sorted(folder.name for folder in path.iterdir()))

    def has_split(self, path: Path, split: str) -> bool:
        return split in self.splits(path)

    def read(self, path: Path, split: str) -> ImageSet:
        images = sorted((path / split).glob("*.bmp"))
        records = [Record(path=str(image), image_id=i, hw=(6, 8), **NO_OBJECT) for i, image in enumerate(images)]
        names = {"name": path.name, "split": split, "class_names": ["a"], "category_ids": [1], "source": str(path)}
        return pack(records, problems=Problems(), **names)  # type: ignore[arg-type]


def test_a_format_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.annotation_formats, "_FORMATS", (*data.annotation_formats._FORMATS, Folder()))
    write_image(tmp_path / "set" / "train" / "a.bmp", (6, 8))
    assert splits_of(tmp_path / "set") == ("train",)
    assert len(open_image_set(tmp_path / "set", "train")) == 1
    with pytest.raises(UserError, match=r"has no split 'val'; it has train\."):
        open_image_set(tmp_path / "set", "val")
    with pytest.raises(UserError, match=r" or a folder of folders of \.bmp images"):
        open_image_set(tmp_path, "train")


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file.*COCO.*VOC.*darknet"):
        open_image_set(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"holds no known data set.*COCO.*VOC.*darknet"):
        open_image_set(tmp_path, "train")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="holds no known data set"):
        open_image_set(tmp_path / "notes.txt", "train")


def test_the_home_of_an_unknown_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"~no-such-user/x: no such file or folder"):
        open_image_set("~no-such-user/x", "train")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_darknet(tmp_path / "set", "train")
    assert len(open_image_set("~/set", "train")) == 3


@pytest.mark.parametrize("style", WRITERS)
def test_no_usable_image(tmp_path: Path, style: str) -> None:
    root = root_of(WRITERS[style](tmp_path / "set", "train"))
    for image in (tmp_path / "set").rglob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match=r"no usable image|are in none of"):
        open_image_set(root, "train")


@pytest.mark.parametrize("style", WRITERS)
def test_boxes_are_cut_to_their_image(tmp_path: Path, style: str) -> None:
    boxes = {
        "reaching out": (60, 40, 100, 70),
        "outside": (90, 10, 120, 30),
        "without area": (20, 20, 20.5, 40),
        "good": (10, 10, 20, 20),
    }
    scene = Scene(stem="a", objects=[("cat", box) for box in boxes.values()])
    rest = Scene(stem="z", objects=[("dog", (1, 1, 9, 9)), ("owl", (1, 1, 9, 9))])
    image_set = open_image_set(root_of(WRITERS[style](tmp_path / "set", "train", [scene, rest])), "train")
    np.testing.assert_allclose(image_set[0].boxes, [(60, 40, 80, 60), (10, 10, 20, 20)], atol=1e-4)
    assert image_set[0].labels.tolist() == [0, 0]
    lines = "\n".join(image_set.problems.summary())
    for expected in (
        "1 box reaching out",
        "1 box outside its image",
        "1 box without area dropped (first: ",
    ):
        assert expected in lines


@pytest.mark.parametrize("style", WRITERS)
def test_missing_image_is_skipped(tmp_path: Path, style: str) -> None:
    root = root_of(WRITERS[style](tmp_path / "set", "train"))
    next((tmp_path / "set").rglob("a.png")).unlink()
    image_set = open_image_set(root, "train")
    assert [Path(image_set[i].path).stem for i in range(len(image_set))] == ["b", "c"]
    assert len(image_set.problems) == 1
    assert "1 missing image skipped (first: " in image_set.problems.summary()[0]


@pytest.mark.parametrize("style", WRITERS)
@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"GIF89a nonsense"])
def test_unreadable_image_is_skipped(tmp_path: Path, style: str, content: bytes) -> None:
    root = root_of(WRITERS[style](tmp_path / "set", "train"))
    next((tmp_path / "set").rglob("b.png")).write_bytes(content)
    image_set = open_image_set(root, "train")
    assert len(image_set) == 2
    assert image_set.problems.summary()[0].startswith("1 unreadable image skipped (first: ")


@pytest.mark.parametrize(
    ("name", "split", "images", "classes"),
    [
        ("bccd", "train", 205, 3),
        ("bccd", "val", 87, 3),
        ("bccd", "test", 72, 3),
        ("coco_tiny", "train", 80, 80),
        ("coco_tiny", "val", 80, 80),
    ],
)
def test_official_sets(shared: Path, name: str, split: str, images: int, classes: int) -> None:
    image_set = open_image_set(shared / "data" / name, split)
    assert len(image_set) == images
    assert len(image_set.class_names) == classes
    if name == "bccd":
        assert image_set.class_names == ("Platelets", "RBC", "WBC")
    for i in range(len(image_set)):
        record = image_set[i]
        height, width = record.hw
        assert (record.boxes[:, :2] >= 0).all()
        assert (record.boxes[:, 2:] <= (width, height)).all()
        assert (record.boxes[:, 2:] - record.boxes[:, :2] >= 1).all()


def test_bccd_has_two_boxes_without_area(shared: Path) -> None:
    lines = [
        line
        for split in ("train", "val")
        for line in open_image_set(shared / "data" / "bccd", split).problems.summary()
    ]
    assert lines == [
        "1 box without area dropped (first: Annotations/BloodImage_00343.xml object 4)",
        "1 box without area dropped (first: Annotations/BloodImage_00338.xml object 13)",
    ]
