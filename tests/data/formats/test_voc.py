from pathlib import Path

import pytest

from data.annotation_formats import open_image_set, splits_of
from data.formats.voc import splits
from data.problems import NO_ANNOTATION
from tests.data.packagings import UNDIVIDED
from tests.data.sets import SCENES, Scene, turn, voc_object, write_voc
from utils.errors import UserError


def test_labels_and_ids_do_not_depend_on_the_split(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    write_voc(tmp_path, "val", SCENES[2:])
    val = open_image_set(tmp_path, "val")
    assert val.class_names == ("cat", "dog", "owl")
    assert val.image_ids == (3,)
    assert val[0].labels.tolist() == [1]


def test_nested_as_it_is_unpacked(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", "train")
    image_set = open_image_set(tmp_path, "train")
    assert (len(image_set), image_set.name) == (3, "VOC2012")
    assert len(open_image_set(tmp_path / "VOCdevkit", "train")) == 3


def test_lists_of_one_class_are_no_splits(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    (tmp_path / "ImageSets" / "Main" / "cat_train.txt").write_text("a  1\n")
    assert splits(tmp_path) == ("train",)
    assert len(open_image_set(tmp_path, "cat_train")) == 1


def test_difficult_objects_become_crowds(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    objects = voc_object("cat", (1, 1, 20, 20), difficult=1) + voc_object("dog", (1, 1, 20, 20))
    (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation>{objects}</annotation>")
    image_set = open_image_set(tmp_path, "train")
    assert image_set[0].is_crowd.tolist() == [True, False]
    assert [each["iscrowd"] for each in image_set.ground_truth()["annotations"][:2]] == [1, 0]


@pytest.mark.parametrize("text", ["", "<annotation>\n<object>", "plain words"])
def test_unusable_xml_skips_its_image(tmp_path: Path, text: str) -> None:
    write_voc(tmp_path, "train")
    (tmp_path / "Annotations" / "c.xml").write_text(text)
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set) == 2
    assert (
        "1 unusable annotation file, its image skipped (first: Annotations/c.xml:" in (image_set.problems.summary()[0])
    )


def test_a_folder_in_place_of_an_xml_skips_its_image(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    (tmp_path / "Annotations" / "c.xml").unlink()
    (tmp_path / "Annotations" / "c.xml").mkdir()
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set) == 2
    assert image_set.problems.lines() == [
        "unusable annotation file, its image skipped: Annotations/c.xml: Is a directory"
    ]


def test_a_set_without_lists_has_no_split(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    (tmp_path / "ImageSets" / "Main" / "train.txt").unlink()
    with pytest.raises(UserError, match=r"has no split 'train'; it has none\.$"):
        open_image_set(tmp_path, "train")


def test_listed_but_not_annotated(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    (tmp_path / "Annotations" / "b.xml").unlink()
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set) == 2
    assert "Annotations/b.xml: missing" in image_set.problems.summary()[0]


def test_malformed_objects_are_dropped_and_named(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    objects = (
        voc_object("cat", (1, 1, 20, 20))
        + "<object><name>dog</name></object>"
        + voc_object("", (1, 1, 20, 20))
        + voc_object("owl", ("nan", 1, 20, 20))
        + voc_object("owl", ("one", 1, 20, 20))
    )
    (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation>{objects}</annotation>")
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set[0].labels) == 1
    assert image_set.problems.summary() == [
        "4 malformed labels dropped (first: Annotations/a.xml object 2: expected <bndbox>, found <name>, "
        "Annotations/a.xml object 3: expected a class in <name>, found none, "
        "Annotations/a.xml object 4: expected numbers in <bndbox>, found xmin='nan', ymin='1', xmax='20', ymax='20')"
    ]


def test_a_dropped_box_is_named_by_its_object(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    objects = "<object/>" + voc_object("cat", (1, 1, 20, 20)) + voc_object("cat", (5, 5, 5, 9))
    (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation>{objects}</annotation>")
    lines = open_image_set(tmp_path, "train").problems.summary()
    assert lines[1] == "1 box without area dropped (first: Annotations/a.xml object 3)"


def test_names_with_spaces_and_names_with_more_words(tmp_path: Path) -> None:
    write_voc(tmp_path, "train", [*SCENES, Scene(stem="my cat", objects=[])])
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(b"\xef\xbb\xbfa  1\n my cat \n\nb -1\nnot there\n")
    image_set = open_image_set(tmp_path, "train")
    assert [Path(image_set[index].path).stem for index in range(3)] == ["a", "my cat", "b"]
    assert "Annotations/not there.xml: missing" in image_set.problems.summary()[0]


def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(b"a\xff\n")
    with pytest.raises(UserError, match=r"train.txt: cannot be read as text"):
        open_image_set(tmp_path, "train")


def write_annotation(root: Path, hw: tuple[int, int], box: tuple[float, float, float, float]) -> None:
    """Of the image a, with its size."""
    size = f"<size><width>{hw[1]}</width><height> {hw[0]} </height><depth>3</depth></size>"
    (root / "Annotations" / "a.xml").write_text(f"<annotation>{size}{voc_object('cat', box)}</annotation>")


def test_an_image_labelled_on_its_side_keeps_the_size_it_was_labelled_in(tmp_path: Path) -> None:
    """As stored, 60 x 80, though its EXIF tag makes it 80 x 60."""
    write_voc(tmp_path, "train")
    turn(tmp_path / "JPEGImages" / "a.png")
    write_annotation(tmp_path, (60, 80), (62, 10, 78, 50))
    image_set = open_image_set(tmp_path, "train")
    assert image_set[0].hw == (60, 80)
    assert image_set[0].boxes.tolist() == [[62, 10, 78, 50]]
    assert image_set.problems.summary() == []


def test_swapped_sides_that_no_exif_explains_are_a_problem(tmp_path: Path) -> None:
    write_voc(tmp_path, "train")
    write_annotation(tmp_path, (80, 60), (62, 10, 78, 50))
    image_set = open_image_set(tmp_path, "train")
    assert image_set[0].hw == (60, 80)
    assert image_set[0].boxes.tolist() == [[62, 10, 78, 50]]
    assert image_set.problems.summary() == [
        "1 image annotated with width and height swapped, its own size used "
        "(first: Annotations/a.xml: annotated as 80x60, the image is 60x80)"
    ]


@pytest.mark.parametrize("name", ["LabelImg's xml", "VOC without lists"])
def test_images_without_annotations_are_told_and_endings_in_capitals_read(tmp_path: Path, name: str) -> None:
    """Where no list says which images there are."""
    path = UNDIVIDED[name](tmp_path)
    whole = open_image_set(path, splits_of(path)[0])
    assert NO_ANNOTATION not in whole.problems.counts
    first, *_, second = sorted(tmp_path.rglob("*.xml"))
    first.unlink()
    second.rename(second.with_suffix(".XML"))
    image_set = open_image_set(path, splits_of(path)[0])
    assert len(image_set) == len(whole) - 1
    assert image_set.problems.counts == {NO_ANNOTATION: 1}
    assert f"/{first.stem}." in image_set.problems.examples[NO_ANNOTATION][0]
