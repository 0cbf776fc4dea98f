from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import convert
from data.annotation_formats import open_image_set, splits_of
from data.formats.writers import WRITERS
from data.image_set import ImageSet
from tests.data.packagings import ONE_JSON, PACKAGINGS, UNDIVIDED
from tests.data.sets import CLASSES, Scene, turn, voc_object, write_coco, write_darknet, write_voc
from utils.errors import UserError

WRITE = {"coco": write_coco, "voc": write_voc, "darknet": write_darknet}
sides = st.floats(0, 60, width=32).map(lambda value: round(value, 2))


@st.composite
def scenes(draw: st.DrawFn, prefix: str) -> list[Scene]:
    """Up to three images with up to three boxes of at least 2 px, and one with an object of each class."""
    drawn = [Scene(stem=f"{prefix}-all", objects=[(name, (1.0, 2.0, 20.0, 30.0)) for name in CLASSES])]
    for number in range(draw(st.integers(0, 3))):
        height, width = draw(st.integers(30, 60)), draw(st.integers(30, 60))
        objects = []
        for _ in range(draw(st.integers(0, 3))):
            left, top = draw(st.floats(0, width - 3)), draw(st.floats(0, height - 3))
            right, bottom = draw(st.floats(left + 2, width)), draw(st.floats(top + 2, height))
            objects.append((draw(st.sampled_from(CLASSES)), (left, top, right, bottom)))
        drawn.append(Scene(stem=f"{prefix} {number}.x", objects=objects, hw=(height, width)))
    return drawn


def rows(image_set: ImageSet) -> list[tuple[str, list[tuple[str, list[float]]]]]:
    records = [image_set[index] for index in range(len(image_set))]
    return sorted(
        (
            Path(each.path).name,
            [(image_set.class_names[label], box) for label, box in zip(each.labels, each.boxes.tolist(), strict=True)],
        )
        for each in records
    )


def assert_same(first: ImageSet, second: ImageSet) -> None:
    one, two = rows(first), rows(second)
    assert [name for name, _ in one] == [name for name, _ in two]
    for (_, objects), (_, others) in zip(one, two, strict=True):
        assert [name for name, _ in objects] == [name for name, _ in others]
        np.testing.assert_allclose(
            np.array([box for _, box in objects]), np.array([box for _, box in others]), rtol=0, atol=1e-4
        )


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(WRITE)), st.sampled_from(sorted(WRITERS)), st.sampled_from(sorted(WRITERS)))
def test_boxes_names_and_splits_survive_every_pair_of_formats(data: st.DataObject, of: str, by: str, to: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for split in ("train", "val"):
            WRITE[of](root / "a", split, data.draw(scenes(split)))
        convert.main([str(root / "a"), str(root / "b"), "--to", by])
        convert.main([str(root / "b"), str(root / "c"), "--to", to, "--copy"])
        assert splits_of(root / "c") == ("train", "val")
        for split in ("train", "val"):
            first, last = (open_image_set(root / folder, split) for folder in ("a", "c"))
            assert set(last.class_names) == set(CLASSES)
            assert len(last.problems) == 0
            assert_same(first, last)


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize(
    "name", ["VOC of CVAT with sub-folders", "COCO of Roboflow", "yaml with polygons", "VOC, images turned"]
)
def test_what_tools_export_is_converted(tmp_path: Path, name: str, to: str) -> None:
    path = PACKAGINGS[name](tmp_path / "a")
    if name == "VOC, images turned" and to in ("yolo", "darknet"):
        with pytest.raises(UserError, match=r"EXIF turns all images of 'train' after their boxes: --to coco or voc"):
            convert.main([str(path), str(tmp_path / "b"), "--to", to])
        return
    convert.main([str(path), str(tmp_path / "b"), "--to", to])
    for split in ("train", "val"):
        assert_same(open_image_set(path, split), open_image_set(tmp_path / "b", split))


def test_ids_and_crowds_survive_in_coco(tmp_path: Path) -> None:
    write_voc(tmp_path / "a", "train")
    objects = voc_object("cat", (1, 1, 20, 20), difficult=1) + voc_object("dog", (1, 1, 20, 20))
    (tmp_path / "a" / "Annotations" / "c.xml").write_text(f"<annotation>{objects}</annotation>")
    write_voc(tmp_path / "a", "val", [])
    (tmp_path / "a" / "ImageSets" / "Main" / "val.txt").write_text("c\n")
    convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "coco"])
    first, second = (open_image_set(tmp_path / folder, "val") for folder in ("a", "b"))
    assert first.image_ids == second.image_ids == (3,)
    assert first.category_ids == second.category_ids
    assert first.is_crowd.tolist() == second.is_crowd.tolist() == [True, False]
    convert.main([str(tmp_path / "b"), str(tmp_path / "c"), "--to", "yolo"])
    assert open_image_set(tmp_path / "c", "val").labels.tolist() == [list(first.class_names).index("dog")]


def test_an_undivided_set_is_divided_on_request(tmp_path: Path) -> None:
    path = UNDIVIDED["LabelImg's xml"](tmp_path / "a")
    convert.main([str(path), str(tmp_path / "whole"), "--to", "voc"])
    assert splits_of(tmp_path / "whole") == ("all",)
    convert.main([str(path), str(tmp_path / "b"), "--to", "yolo", "--val-fraction", "0.4", "--classes", "cat,owl"])
    sets = [open_image_set(tmp_path / "b", split) for split in ("train", "val")]
    assert [len(each) for each in sets] == [3, 2]
    assert sets[0].class_names == ("cat", "owl")


def test_one_json_becomes_a_whole(tmp_path: Path) -> None:
    path = ONE_JSON["Label Studio"](tmp_path / "a")
    convert.main([str(path), str(tmp_path / "b"), "--to", "coco"])
    assert_same(open_image_set(path, "val"), open_image_set(tmp_path / "b", "all"))


def test_images_are_linked_or_copied(tmp_path: Path) -> None:
    path = PACKAGINGS["darknet"](tmp_path / "a")
    for folder, flags, linked in (("b", [], True), ("c", ["--copy"], False)):
        convert.main([str(path), str(tmp_path / folder), "--to", "coco", *flags])
        images = list((tmp_path / folder).rglob("*.png"))
        assert len(images) == 5 and all(image.is_symlink() == linked for image in images)


def test_boxes_of_the_image_as_stored_have_no_place_in_label_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "a", "train")
    turn(tmp_path / "a" / "train" / "a.png")
    convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "yolo"])
    assert len(open_image_set(tmp_path / "b", "train")) == 2
    assert "1 images of train are left out: their boxes lie as before EXIF turned them" in capsys.readouterr().out


def test_what_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    write_coco(tmp_path / "a", "train")
    with pytest.raises(UserError, match=r"a: already exists; name a new folder"):
        convert.main([str(tmp_path / "a"), str(tmp_path / "a"), "--to", "coco"])
    write_coco(tmp_path / "a", "holidays")
    with pytest.raises(UserError, match=r"split 'holidays' has no place in this format; --to coco and voc keep it"):
        convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "darknet"])
    (tmp_path / "a" / "train" / "a.bmp").write_bytes((tmp_path / "a" / "train" / "a.png").read_bytes())
    file = tmp_path / "a" / "annotations" / "instances_train.json"
    file.write_text(file.read_text().replace('"b.png"', '"a.bmp"'))
    with pytest.raises(UserError, match=r"a\.png and a\.bmp would share one label file"):
        convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "coco"])
