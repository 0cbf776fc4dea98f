import json
from pathlib import Path

import pytest

from data.source import image_set_splits, open_image_set
from tests.data.sets import write_coco
from utils.errors import UserError


def changed(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_dated_names_and_both_folder_layouts(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train2017")
    assert image_set_splits(tmp_path) == ("train",)
    assert len(open_image_set(tmp_path, "train")) == 3
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images" / "train2017")
    assert len(open_image_set(tmp_path, "train")) == 3
    assert len(open_image_set(file, "train")) == 3


def test_a_lone_json_with_pictures_beside_it_fits_every_split(tmp_path: Path) -> None:
    write_coco(tmp_path, "train").rename(tmp_path / "train" / "labels.json")
    image_set = open_image_set(tmp_path / "train" / "labels.json", "val")
    assert len(image_set) == 3
    assert image_set.split == "val"


def test_category_ids_are_made_contiguous_in_their_order(tmp_path: Path) -> None:
    write_coco(tmp_path, "train")
    image_set = open_image_set(tmp_path, "train")
    assert image_set.category_ids == (3, 7, 9)
    assert image_set.class_names == ("cat", "dog", "owl")


def test_ground_truth_is_the_file_unchanged(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    changed(file, info={"year": 2017})
    assert open_image_set(tmp_path, "train").ground_truth() == json.loads(file.read_text())


def test_crowds(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    annotations = json.loads(file.read_text())["annotations"]
    annotations[1]["iscrowd"] = 1
    changed(file, annotations=annotations)
    assert open_image_set(tmp_path, "train")[0].is_crowd.tolist() == [False, True]


def test_faulty_annotations_are_dropped_and_named(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    good = json.loads(file.read_text())["annotations"]
    faults = [
        {**good[0], "id": 50, "bbox": [1, 2, 3]},
        {**good[0], "id": 51, "bbox": [1, 2, 3, None]},
        {**good[0], "id": 52, "bbox": [1, 2, 3, float("nan")]},
        {**good[0], "id": 53, "category_id": 1000},
        {"id": 54, "bbox": [1, 2, 3, 4], "category_id": 3},
    ]
    changed(file, annotations=good + faults)
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set.boxes) == len(good)
    assert image_set.problems.summary() == [
        "4 malformed labels dropped (first: instances_train.json, annotation 50)",
        "1 label of an unknown class dropped (first: instances_train.json, annotation 53, category 1000)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"instances_train.json:1: not valid json"),
        ("[]", "with a list 'images'"),
        ('{"images": [{"id": 1}]}', "with a list 'images', each with file_name and id"),
        ('{"images": [], "annotations": []}', "with a list 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "'categories' is empty"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "'images' is empty"),
    ],
)
def test_unusable_json(tmp_path: Path, text: str, message: str) -> None:
    write_coco(tmp_path, "train").write_text(text)
    with pytest.raises(UserError, match=message):
        open_image_set(tmp_path, "train")


def test_missing_sizes_are_read_from_the_pictures(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    images = [{"id": row["id"], "file_name": row["file_name"]} for row in json.loads(file.read_text())["images"]]
    changed(file, images=images)
    image_set = open_image_set(tmp_path, "train")
    assert [image_set[i].hw for i in range(3)] == [(60, 80), (60, 80), (60, 64)]
