"""Which images train, select and test: never the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.annotation_formats import open_image_set
from study.splits import Splits, check_apart, open_splits
from tests.study.folders import roboflow, voc
from utils.errors import UserError


def names(splits: Splits) -> list[set[str]]:
    parts = (splits.train, splits.val, splits.test)
    return [{os.path.basename(os.fsdecode(path)) for path in part.paths.tolist()} for part in parts]


@pytest.mark.parametrize(
    ("make", "sizes", "origin"),
    [
        (lambda root: voc(root, 20), (12, 4, 4), "nothing divides it"),
        (lambda root: roboflow(root, train=10, valid=4, test=3), (10, 4, 3), "own splits"),
        (lambda root: roboflow(root, train=10, valid=4), (8, 2, 4), "test is its split 'val'"),
        (lambda root: roboflow(root, train=10, test=3), (8, 2, 3), "test is its split 'test'"),
        (lambda root: roboflow(root, train=10), (6, 2, 2), "nothing divides it"),
    ],
)
def test_three_parts_share_no_image(
    make: Callable[[Path], Path], sizes: tuple[int, ...], origin: str, tmp_path: Path
) -> None:
    splits = open_splits(str(make(tmp_path)))
    parts = names(splits)
    assert tuple(map(len, parts)) == sizes == tuple(len(p) for p in (splits.train, splits.val, splits.test))
    assert len(set.union(*parts)) == sum(sizes)
    assert origin in splits.origin
    assert [part.split for part in (splits.train, splits.val, splits.test)] == ["train", "val", "test"]


def test_the_data_sets_own_test_images_stay_test_images(tmp_path: Path) -> None:
    train, val, test = names(open_splits(str(roboflow(tmp_path, train=10, valid=4, test=3))))
    assert all(name.startswith("train") for name in train)
    assert all(name.startswith("valid") for name in val) and all(name.startswith("test") for name in test)


def test_an_image_keeps_its_part_when_others_are_added(tmp_path: Path) -> None:
    few, more = (names(open_splits(str(voc(tmp_path / str(count), count)))) for count in (40, 42))
    changed = [before - after for before, after in zip(few, more, strict=True)]
    assert sum(map(len, changed)) <= 4


def test_augmented_copies_of_an_image_are_in_one_part(tmp_path: Path) -> None:
    """Roboflow exports one image several times, as a_jpg.rf.HASH.jpg."""
    folder = roboflow(tmp_path, train=30)
    for image in (folder / "train" / "images").iterdir():
        number = int(image.name.removeprefix("train").partition("_")[0])
        stem = f"photo{number // 4}_jpg.rf.{number:032x}"
        (folder / "train" / "labels" / f"{image.stem}.txt").rename(folder / "train" / "labels" / f"{stem}.txt")
        image.rename(image.with_name(f"{stem}.jpg"))
    parts = names(open_splits(str(folder)))
    photos = [{name.partition(".rf.")[0] for name in part} for part in parts]
    assert len(set.union(*photos)) == sum(map(len, photos)) == 8 and sum(map(len, parts)) == 30


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    lists = {"train": range(8), "val": range(8, 12), "test": range(10, 14)}
    with pytest.raises(UserError, match="splits 'val' and 'test' share 2 images"):
        open_splits(str(voc(tmp_path, 14, lists=lists)))


def test_another_spelling_of_a_path_is_the_same_image(tmp_path: Path) -> None:
    whole = open_image_set(voc(tmp_path, 3), "all")
    respelled = [
        os.fsencode(tmp_path / "JPEGImages" / ".." / "JPEGImages" / f"image{number}.jpg") for number in range(3)
    ]
    with pytest.raises(UserError, match="share 3 images"):
        check_apart(whole, replace(whole, paths=np.array(respelled)))


def test_parts_without_objects_or_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        open_splits(str(voc(tmp_path, 2)))
    empty = roboflow(tmp_path / "r", train=3, valid=2, test=2)
    for label in (empty / "test" / "labels").iterdir():
        label.write_text("")
    with pytest.raises(UserError, match="none of the 2 images of 'test' has an object"):
        open_splits(str(empty))


def test_classes_are_those_that_train_py_would_take(tmp_path: Path) -> None:
    splits = open_splits(str(voc(tmp_path, 20)), ("cat",))
    assert splits.test.class_names == ("cat",)
    with pytest.raises(UserError, match="has no class 'dog'"):
        open_splits(str(tmp_path), ("dog",))
