import logging
from pathlib import Path

import numpy as np
import pytest

from data.augment_options import AugmentOptions
from data.dataset import EvalDataset, EvalKey, SampleKey, ShrunkImages, TrainDataset
from data.image_set import ImageSet
from tests.data.sets import noise_image_set, turn, write_image
from utils.errors import UserError


def test_images_are_shrunk_with_their_boxes(tmp_path: Path) -> None:
    images = ShrunkImages(noise_image_set(tmp_path, 3, hw=(120, 160)), longest_px=40)
    sample = images(2)
    assert sample.image.shape == (30, 40, 3)
    np.testing.assert_allclose(sample.boxes, [[2.5, 2.5, 10, 10], [7.5, 1.25, 17.5, 12.5]])


def test_annotations_of_another_size_are_scaled(tmp_path: Path) -> None:
    image_set = noise_image_set(tmp_path, 2, hw=(60, 80))
    write_image(tmp_path / "001.png", (30, 40))
    np.testing.assert_allclose(ShrunkImages(image_set, longest_px=500)(1).boxes, [[5, 5, 20, 20]])


def test_swapped_sides_that_no_exif_explains_leave_boxes_where_they_are(tmp_path: Path) -> None:
    """As in a COCO set that is too large for its images to be opened beforehand."""
    image_set = noise_image_set(tmp_path, 3, hw=(60, 80))
    write_image(tmp_path / "002.png", (80, 60))
    boxes = [[10, 10, 40, 40], [30, 5, 70, 50]]
    np.testing.assert_allclose(ShrunkImages(image_set, longest_px=500)(2).boxes, boxes)
    np.testing.assert_allclose(ShrunkImages(image_set, longest_px=40)(2).boxes, np.array(boxes) / 2)
    sample = EvalDataset(image_set, letterbox=True)[EvalKey(2, (160, 160))]
    assert sample.placement is not None and sample.placement.source_hw == (80, 60)
    np.testing.assert_allclose(sample.placement.to_source(np.array([[50, 10, 90, 70]])), [[15, 5, 35, 35]])


def test_swapped_sides_of_an_image_that_is_decoded_reduced(tmp_path: Path) -> None:
    image_set = noise_image_set(tmp_path, 2, hw=(800, 600))
    write_image(tmp_path / "a.jpg", (600, 800))
    (tmp_path / "a.jpg").rename(tmp_path / "001.png")
    sample = ShrunkImages(image_set, longest_px=200)(1)
    assert sample.image.shape == (150, 200, 3)
    np.testing.assert_allclose(sample.boxes, [[2.5, 2.5, 10, 10]])


def test_an_image_turned_by_exif_follows_its_annotations(tmp_path: Path) -> None:
    image_set = noise_image_set(tmp_path, 2, hw=(60, 80))
    turn(tmp_path / "001.png")
    sample = ShrunkImages(image_set, longest_px=500)(1)
    assert sample.image.shape == (60, 80, 3)
    np.testing.assert_allclose(sample.boxes, [[10, 10, 40, 40]])


def test_unreadable_image_is_replaced_and_named_once(noise_set: ImageSet, caplog: pytest.LogCaptureFixture) -> None:
    for broken in (4, 5, 10):
        Path(noise_set[broken].path).write_bytes(b"no image")
    images = ShrunkImages(noise_set, longest_px=500)
    with caplog.at_level(logging.WARNING):
        assert [images(i).image_id for i in (4, 4, 10)] == [106, 106, 100]
    assert [Path(record.getMessage().split(":")[0]).name for record in caplog.records] == [
        "004.png",
        "005.png",
        "010.png",
    ]


def test_nothing_readable(noise_set: ImageSet) -> None:
    for i in range(len(noise_set)):
        Path(noise_set[i].path).unlink()
    with pytest.raises(UserError, match="none of its 11 images can be read"):
        ShrunkImages(noise_set, longest_px=500)(0)


def test_a_key_makes_its_sample_whatever_was_made_before(noise_set: ImageSet) -> None:
    images = ShrunkImages(noise_set, longest_px=96)
    one, other = (TrainDataset(images, AugmentOptions(), seed=3) for _ in range(2))
    key = SampleKey(epoch=2, position=5, image=7, input_hw=(64, 64))
    other[SampleKey(epoch=0, position=0, image=1, input_hw=(32, 32))]
    np.testing.assert_array_equal(one[key].image, other[key].image)
    assert one[key].image_id == 107
    for different in (key._replace(epoch=3), key._replace(position=6)):
        assert (one[different].image != one[key].image).any()
    assert (TrainDataset(images, AugmentOptions(), seed=4)[key].image != one[key].image).any()


@pytest.mark.parametrize("letterbox", [False, True])
def test_evaluation_shows_the_whole_image(noise_set: ImageSet, letterbox: bool) -> None:
    dataset = EvalDataset(noise_set, letterbox=letterbox)
    for i in range(len(noise_set)):
        sample = dataset[EvalKey(i, (96, 96))]
        assert sample.image.shape == (96, 96, 3)
        assert sample.image_id == noise_set[i].image_id
        assert sample.placement is not None
        np.testing.assert_allclose(sample.placement.to_source(sample.boxes), noise_set[i].boxes, atol=1e-4)


def test_unreadable_image_is_evaluated_as_grey(noise_set: ImageSet, caplog: pytest.LogCaptureFixture) -> None:
    Path(noise_set[2].path).write_bytes(b"")
    sample = EvalDataset(noise_set, letterbox=False)[EvalKey(2, (64, 64))]
    assert (sample.image == 127).all()
    assert (sample.image_id, len(sample.labels)) == (102, 2)
    assert "002.png" in caplog.text
