from pathlib import Path

import pytest

from cfg.plan import load_plan
from data.annotation_formats import open_image_set, splits_of
from data.formats.label_files import LabelFiles
from data.problems import Problems
from models.weights.trained import class_names
from tests.data.sets import write_darknet, write_image
from utils.errors import UserError


def test_data_file_or_its_folder(tmp_path: Path) -> None:
    file = write_darknet(tmp_path / "set", "train")
    assert len(open_image_set(file, "train")) == len(open_image_set(file.parent, "train")) == 3


def test_val_is_the_key_valid_and_absolute_paths_work(tmp_path: Path) -> None:
    file = write_darknet(tmp_path / "set", "val")
    lines = (file.parent / "val.txt").read_text().split()
    (tmp_path / "elsewhere.txt").write_text("\n".join(str(file.parent / line) for line in lines))
    file.write_text(f"classes=3\nvalid={tmp_path / 'elsewhere.txt'}\n")
    image_set = open_image_set(file, "val")
    assert len(image_set) == 3
    assert image_set.class_names == ("class 0", "class 1", "class 2")


def test_unnamed_classes_are_those_of_weights_without_names(tmp_path: Path) -> None:
    file = write_darknet(tmp_path, "train")
    file.write_text("classes = 3\ntrain = train.txt\n")
    named, _ = class_names(load_plan("yolov4-tiny", classes=3))
    assert open_image_set(file, "train").class_names == named


def label_file(image: Path) -> Path | None:
    return LabelFiles(["cat"], Problems()).label_file(image)


def test_label_file_follows_darknets_rule(tmp_path: Path) -> None:
    for image, label in (
        ("x/images/train2017/a.jpg", "x/labels/train2017/a.txt"),
        ("VOC2007/JPEGImages/a.b.jpg", "VOC2007/labels/a.b.txt"),
        ("flat/a.png", "flat/a.txt"),
        ("images/images/a.png", "images/labels/a.txt"),
    ):
        assert label_file(tmp_path / image) is None
        (tmp_path / label).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / label).write_text("")
        assert label_file(tmp_path / image) == tmp_path / label


def test_faulty_lines_are_dropped_and_named(tmp_path: Path) -> None:
    file = write_darknet(tmp_path, "train")
    labels = tmp_path / "labels" / "b.txt"
    labels.write_text("0 .5 .5 .1 .1\n0 .5 .5 .1\n\nzero .5 .5 .1 .1\n0 nan .5 .1 .1\n1.5 .5 .5 .1 .1\n3 .5 .5 .1 .1\n")
    image_set = open_image_set(file, "train")
    assert image_set[1].labels.tolist() == [0]
    assert image_set.problems.summary() == [
        f"4 malformed labels dropped (first: {labels}:2: expected 'class x y w h', found 4 numbers, "
        f"{labels}:4: expected 'class x y w h', found 'zero .5 .5 .1 .1' (expected the class's number, from 0), "
        f"{labels}:5: expected 'class x y w h', found '0 nan .5 .1 .1')",
        f"1 label of an unknown class dropped (first: {labels}:7 names class 3 of 3)",
    ]


def test_byte_order_marks(tmp_path: Path) -> None:
    file = write_darknet(tmp_path, "train")
    plain = open_image_set(file, "train")
    for text in [*tmp_path.glob("*.*"), *(tmp_path / "labels").glob("*.txt")]:
        text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    marked = open_image_set(file, "train")
    assert marked.class_names == plain.class_names
    assert marked.boxes.tolist() == plain.boxes.tolist()
    assert len(marked.problems) == 0


def test_two_classes_of_one_name(tmp_path: Path) -> None:
    file = write_darknet(tmp_path, "train")
    (tmp_path / "set.names").write_text("cat\ndog\ncat\n")
    with pytest.raises(UserError, match=r"set.names: names the class 'cat' more than once"):
        open_image_set(file, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train = train.txt\n", "expected 'classes = N'"),
        ("classes = many\ntrain = train.txt\n", "expected 'classes = N'"),
        ("classes = 4\nnames = set.names\ntrain = train.txt\n", "classes = 4, but set.names has 3 names"),
        ("classes = 3\ntrain = gone.txt\n", "names the file gone.txt, which does not exist"),
        ("classes = 3\nnames = gone.names\ntrain = train.txt\n", "names the file gone.names"),
    ],
)
def test_unusable_data_file(tmp_path: Path, text: str, message: str) -> None:
    file = write_darknet(tmp_path, "train")
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        open_image_set(file, "train")


def test_a_data_file_that_lists_no_images(tmp_path: Path) -> None:
    file = write_darknet(tmp_path, "train")
    file.write_text("classes = 3\nnames = set.names\n")
    sentence = r"set\.data: names no list of images: expected 'train = FILE', 'valid = FILE' or 'test = FILE'\.$"
    for path in (file, tmp_path):
        with pytest.raises(UserError, match=sentence):
            open_image_set(path, "train")
        with pytest.raises(UserError, match=sentence):
            splits_of(path)


def test_empty_list(tmp_path: Path) -> None:
    file = write_darknet(tmp_path, "train")
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(UserError, match="it lists none"):
        open_image_set(file, "train")


def test_image_beside_a_label_of_another_encoding(tmp_path: Path) -> None:
    file = write_darknet(tmp_path, "train")
    write_image(tmp_path / "images" / "b.png", (60, 80))
    (tmp_path / "labels" / "b.txt").write_bytes(b"\xff\xfe\x00\x01 garbage\n")
    assert "malformed" in open_image_set(file, "train").problems.summary()[0]
