import contextlib
import io
import json
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.annotation_formats import open_image_set
from data.formats import coco
from data.formats.coco import splits
from data.image_set import ImageSet
from tests.data.sets import SCENES, Scene, turn, write_coco
from utils.errors import UserError


def changed(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_dated_names_and_both_folder_layouts(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train2017")
    assert splits(tmp_path) == ("train",)
    assert len(open_image_set(tmp_path, "train")) == 3
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images" / "train2017")
    assert len(open_image_set(tmp_path, "train")) == 3
    assert len(open_image_set(file, "train")) == 3


def test_of_two_years_each_has_its_own_name(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "val2014", SCENES[:1])
    write_coco(tmp_path, "val2017")
    assert splits(tmp_path) == ("val",)
    counts = {split: len(open_image_set(tmp_path, split)) for split in ("val", "val2014", "val2017")}
    assert counts == {"val": 3, "val2014": 1, "val2017": 3}
    assert len(open_image_set(file, "val2014")) == len(open_image_set(file, "val")) == 1
    for path in (tmp_path, file):
        with pytest.raises(UserError, match=r"has no split 'val2015'; it has val\."):
            open_image_set(path, "val2015")


def test_images_are_looked_for_by_every_name(tmp_path: Path) -> None:
    scenes = [Scene(stem=f"{number:02}", objects=[]) for number in range(30)]
    write_coco(tmp_path, "train", scenes)
    for scene in scenes[:29]:
        (tmp_path / "train" / f"{scene.stem}.png").unlink()
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set) == 1
    assert image_set.problems.summary()[0].startswith("29 missing images skipped (first: ")


def test_a_byte_order_mark(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set) == 3
    assert len(image_set.ground_truth()["annotations"]) == 3


def test_a_lone_json_with_images_beside_it_fits_every_split(tmp_path: Path) -> None:
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
        "4 malformed labels dropped (first: "
        "instances_train.json annotation 50: expected 4 numbers as bbox, found [1, 2, 3], "
        "instances_train.json annotation 51: expected 4 numbers as bbox, found [1, 2, 3, null], "
        "instances_train.json annotation 52: expected 4 numbers as bbox, found [1, 2, 3, NaN])",
        "1 label of an unknown class dropped (first: instances_train.json annotation 53: names category 1000)",
    ]


@pytest.mark.parametrize("bbox", [{}, {"bbox": None}, {"bbox": []}], ids=str)
def test_a_polygon_without_a_bbox_is_distinguished_from_a_malformed_label(
    tmp_path: Path, bbox: dict[str, object]
) -> None:
    file = write_coco(tmp_path, "train")
    good = json.loads(file.read_text())["annotations"]
    polygon = {"id": 50, "image_id": 1, "category_id": 3, "segmentation": [[1, 1, 30, 1, 30, 30]], "area": 420}
    changed(file, annotations=[*good, polygon | bbox])
    image_set = open_image_set(tmp_path, "train")
    assert image_set.problems.summary() == [
        "1 annotation without a bbox dropped (first: instances_train.json annotation 50: has a segmentation only)"
    ]
    assert image_set.ground_truth()["annotations"] == good


FAULTS = [
    {"category_id": 1000},
    {"category_id": None},
    {"category_id": [3]},
    {"bbox": None},
    {"bbox": []},
    {"bbox": [1, 2, 3]},
    {"bbox": [1, 2, 3, "4"]},
    {"bbox": [1, 2, 3, float("inf")]},
    {"bbox": [1, 2, 3, 10**400]},
    {"bbox": {"x": 1}},
    {"image_id": None},
    {"image_id": 1000},
    {"image_id": {"a": 1}},
    {"image_id": "1a"},
    {"area": 10**400},
    {"iscrowd": 10**300},
    {"id": [1]},
    {"area": "large"},
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_reader_and_ground_truth_drop_the_same_rows(tmp_path: Path, fault: dict[str, object]) -> None:
    file = write_coco(tmp_path, "train")
    good = json.loads(file.read_text())["annotations"]
    changed(file, annotations=[good[0], {**good[0], "id": 99} | fault, *good[1:]])
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set.problems) == 1
    assert len(image_set.boxes) == len(good)
    assert image_set.ground_truth()["annotations"] == good
    assert score(image_set) == pytest.approx(1)


MENDED = [{"image_id": "1"}, {"category_id": "3"}, {"area": None}, {"iscrowd": None}, {"iscrowd": False}]


@pytest.mark.parametrize("row", MENDED, ids=str)
def test_numbers_in_quotes_and_nulls_that_say_nothing_are_read(tmp_path: Path, row: dict[str, object]) -> None:
    file = write_coco(tmp_path, "train")
    plain = open_image_set(tmp_path, "train")
    good = json.loads(file.read_text())["annotations"]
    changed(file, annotations=[good[0] | row, *good[1:]])
    image_set = open_image_set(tmp_path, "train")
    assert image_set.problems.summary() == []
    assert image_set.boxes.tolist() == plain.boxes.tolist()
    assert len(image_set.ground_truth()["annotations"]) == len(good)


@pytest.mark.parametrize("missing", ["bbox", "image_id", "category_id"])
def test_rows_that_lack_what_is_needed(tmp_path: Path, missing: str) -> None:
    file = write_coco(tmp_path, "train")
    good = json.loads(file.read_text())["annotations"]
    changed(file, annotations=[*good, {key: value for key, value in good[0].items() if key != missing}])
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set.problems) == 1
    assert image_set.ground_truth()["annotations"] == good


def test_ground_truth_keeps_boxes_that_only_the_reader_drops(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    good = json.loads(file.read_text())["annotations"]
    odd = [
        {**good[0], "id": 50, "bbox": [5, 5, 0, 10], "extra": "kept"},
        {**good[0], "id": 51, "bbox": [900, 5, 10, 10]},
        {**good[0], "id": 52, "bbox": [70, 5, 100, 10]},
    ]
    changed(file, annotations=good + odd, licenses=None)
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set.boxes) == len(good) + 1
    assert image_set.ground_truth() == json.loads(file.read_text())


def score(image_set: ImageSet) -> float:
    """AP of the readers' own boxes against the set's ground truth."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = image_set.ground_truth()
        ground_truth.createIndex()
        rows = []
        for index in range(len(image_set)):
            record = image_set[index]
            for (left, top, right, bottom), label in zip(record.boxes.tolist(), record.labels, strict=True):
                rows.append(
                    {
                        "image_id": record.image_id,
                        "category_id": image_set.category_ids[label],
                        "bbox": [left, top, right - left, bottom - top],
                        "score": 0.9,
                    }
                )
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.parametrize("info", [None, [], "words", {}, {"mirror_safe": True}])
def test_info_of_any_kind(tmp_path: Path, info: object) -> None:
    changed(write_coco(tmp_path, "train"), info=info)
    assert open_image_set(tmp_path, "train").mirror_safe


@pytest.mark.parametrize("key", ["images", "categories"])
@pytest.mark.parametrize("odd", ["a7", None, [1], 1.5, 2**70, float("nan")])
def test_ids_that_are_no_integers(tmp_path: Path, key: str, odd: object) -> None:
    file = write_coco(tmp_path, "train")
    rows = json.loads(file.read_text())[key]
    rows[1]["id"] = odd
    changed(file, **{key: rows})
    with pytest.raises(UserError, match=rf"instances_train.json: expected integer ids in its list '{key}', found"):
        open_image_set(tmp_path, "train")


@pytest.mark.parametrize("key", ["images", "categories"])
def test_ids_that_two_have(tmp_path: Path, key: str) -> None:
    """As in two data sets put into one file that both count from 1: their boxes would be each other's."""
    file = write_coco(tmp_path, "train")
    rows = json.loads(file.read_text())[key]
    rows[1]["id"] = rows[0]["id"]
    changed(file, **{key: rows})
    with pytest.raises(
        UserError, match=rf"instances_train.json: two rows of its list '{key}' have the id {rows[0]['id']},"
    ):
        open_image_set(tmp_path, "train")


def test_a_linked_annotation_file_belongs_to_where_the_link_is(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "set", "train")
    (tmp_path / "store").mkdir()
    stored = file.rename(tmp_path / "store" / "instances_train2017.json")
    file.symlink_to(stored)
    assert len(open_image_set(tmp_path / "set", "train")) == 3
    (tmp_path / "set" / "train").rename(tmp_path / "store" / "train2017")  # or to where it leads
    assert len(open_image_set(tmp_path / "set", "train")) == 3


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    images = json.loads(file.read_text())["images"]
    images[0]["file_name"] = None
    changed(file, images=images)
    with pytest.raises(UserError, match=r"instances_train.json: expected file names .* found null"):
        open_image_set(tmp_path, "train")


def test_two_categories_of_one_name(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    categories = json.loads(file.read_text())["categories"]
    changed(file, categories=[*categories, {"id": 20, "name": "dog"}])
    with pytest.raises(UserError, match=r"instances_train.json: names the class 'dog' more than once"):
        open_image_set(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"not an image"])
@pytest.mark.parametrize(("opened", "found"), [(3, 2), (2, 3)])
def test_only_large_sets_are_taken_at_their_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, opened: int, found: int
) -> None:
    write_coco(tmp_path, "train")
    (tmp_path / "train" / "b.png").write_bytes(content)
    monkeypatch.setattr(coco, "_OPENED_IMAGES", opened)
    image_set = open_image_set(tmp_path, "train")
    assert len(image_set) == found
    assert [line.split(" (")[0] for line in image_set.problems.summary()] == ["1 unreadable image skipped"] * (
        3 - found
    )


def test_a_written_size_is_the_one_the_boxes_refer_to(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    images = json.loads(file.read_text())["images"]
    images[1] |= {"height": 120, "width": 160}
    changed(file, images=images)
    image_set = open_image_set(tmp_path, "train")
    assert image_set[1].hw == (120, 160)
    (told,) = image_set.problems.summary()
    assert (
        told.startswith("1 image of another size than annotated") and "annotated as 120x160, the image is 60x80" in told
    )


@pytest.mark.parametrize("opened", [3, 2])
def test_an_image_turned_by_exif_may_be_annotated_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: int
) -> None:
    write_coco(tmp_path, "train")
    plain = open_image_set(tmp_path, "train")
    turn(tmp_path / "train" / "a.png")
    monkeypatch.setattr(coco, "_OPENED_IMAGES", opened)
    image_set = open_image_set(tmp_path, "train")
    assert image_set[0].hw == (60, 80)
    assert image_set.boxes.tolist() == plain.boxes.tolist()
    assert image_set.problems.summary() == []


@pytest.mark.parametrize(("opened", "found"), [(3, 2), (2, 1)])
def test_swapped_sides_that_no_exif_explains_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: int, found: int
) -> None:
    """Of a set that is taken at its word only where boxes belie it: those of a reach out, that of c does not."""
    file = write_coco(tmp_path, "train")
    plain = open_image_set(tmp_path, "train")
    images = [
        {**row, "height": row["width"], "width": row["height"]} if row["id"] != 2 else row
        for row in json.loads(file.read_text())["images"]
    ]
    changed(file, images=images)
    monkeypatch.setattr(coco, "_OPENED_IMAGES", opened)
    image_set = open_image_set(tmp_path, "train")
    assert image_set.boxes.tolist() == plain.boxes.tolist()
    assert image_set[0].hw == (60, 80)
    assert image_set[2].hw == ((60, 64) if found == 2 else (64, 60))
    (line,) = image_set.problems.lines()[:1]
    assert line == (
        "image annotated with width and height swapped, its own size used: "
        f"{tmp_path / 'train' / 'a.png'}: annotated as 80x60, the image is 60x80"
    )
    assert len(image_set.problems) == found


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


def test_missing_sizes_are_read_from_the_images(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "train")
    images = [{"id": row["id"], "file_name": row["file_name"]} for row in json.loads(file.read_text())["images"]]
    changed(file, images=images)
    image_set = open_image_set(tmp_path, "train")
    assert [image_set[i].hw for i in range(3)] == [(60, 80), (60, 80), (60, 64)]
