"""The nouns: placements undo themselves, batches can be cut without loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.structures import Batch, Detections, Placement, Targets

STRETCHED = Placement(source_hw=(300, 500), scale_x=0.4, scale_y=0.9, left_px=0.0, top_px=0.0)
LETTERBOXED = Placement(source_hw=(300, 500), scale_x=0.5, scale_y=0.5, left_px=3.0, top_px=53.0)


def boxes_within(height: int, width: int) -> np.ndarray:
    corners = np.random.default_rng(0).uniform(0, 1, (50, 2, 2)) * (width, height)
    return np.concatenate((corners.min(1), corners.max(1)), axis=1).astype(np.float32)


@pytest.mark.parametrize("placement", [STRETCHED, LETTERBOXED])
def test_to_source_undoes_to_input(placement):
    boxes = boxes_within(300, 500)
    there = placement.to_input(boxes)
    assert np.abs(there - boxes).max() > 10
    np.testing.assert_allclose(placement.to_source(there), boxes, atol=1e-3)


def test_to_input_is_scale_then_offset():
    made = LETTERBOXED.to_input(np.array([[10, 20, 110, 220]], np.float32))
    assert made.tolist() == [[8, 63, 58, 163]]


def test_to_source_clips_to_the_image():
    made = LETTERBOXED.to_source(np.array([[-50, -50, 900, 900], [0, 0, 3, 40]], np.float32))
    assert made.tolist() == [[0, 0, 500, 300], [0, 0, 0, 0]]


@pytest.mark.parametrize("placement", [STRETCHED, LETTERBOXED])
def test_no_boxes_stay_none(placement):
    assert placement.to_source(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert placement.to_input(np.zeros((0, 4), np.float32)).shape == (0, 4)


# --- Targets and Batch ---------------------------------------------------------------------------------------


def batch_of(images: int, objects: int = 40) -> Batch:
    return Batch(
        images=torch.arange(images).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8),
        targets=Targets(
            boxes=torch.rand(objects, 4),
            labels=torch.arange(objects),  # so that each object can be told apart
            image_index=torch.randint(0, max(images, 1), (objects,)),  # in no order
            is_crowd=torch.rand(objects) < 0.3,
        ),
        image_ids=tuple(range(100, 100 + images)),
        paths=tuple(f"{i}.jpg" for i in range(images)),
        placements=(None,) * images,
    )


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 8, 20])
def test_a_split_is_a_partition(parts):
    whole = batch_of(8)
    cut = list(whole.split(parts))
    sizes = [len(part) for part in cut]
    assert len(cut) == min(parts, 8) and sum(sizes) == 8 and max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([part.images for part in cut]), whole.images)
    assert sum((part.image_ids for part in cut), ()) == whole.image_ids
    assert sum((part.paths for part in cut), ()) == whole.paths
    seen = []
    for part in cut:
        assert len(part.image_ids) == len(part.paths) == len(part.placements) == len(part)
        for label, image in zip(part.targets.labels.tolist(), part.targets.image_index.tolist(), strict=True):
            assert 0 <= image < len(part)
            assert part.image_ids[image] == 100 + whole.targets.image_index[label].item()
            seen.append(label)
        assert torch.equal(part.targets.boxes, whole.targets.boxes[part.targets.labels])
        assert torch.equal(part.targets.is_crowd, whole.targets.is_crowd[part.targets.labels])
    assert sorted(seen) == list(range(40))


def test_more_parts_than_images_give_one_each():
    assert [len(part) for part in batch_of(3).split(100)] == [1, 1, 1]


def test_a_batch_without_objects_or_without_images_can_be_split():
    assert [len(part.targets) for part in batch_of(4, objects=0).split(2)] == [0, 0]
    assert [len(part) for part in batch_of(0, objects=0).split(2)] == [0]


def test_targets_of_images_are_renumbered():
    targets = batch_of(5).targets
    here = targets.of_images(2, 4)
    expected = [(label, index - 2) for label, index in enumerate(targets.image_index.tolist()) if index in (2, 3)]
    assert list(zip(here.labels.tolist(), here.image_index.tolist(), strict=True)) == expected
    assert len(targets.of_images(2, 2)) == 0


def test_bytes_become_shares_and_floats_stay():
    batch = batch_of(2, objects=0)
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    made = Batch(images=images, targets=batch.targets, image_ids=(1,), paths=("",), placements=(None,)).pixels()
    assert made.dtype == torch.float32 and made.flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert images.flatten().tolist() == [0, 51, 255]
    floats = Batch(images=made, targets=batch.targets, image_ids=(1,), paths=("",), placements=(None,))
    assert floats.pixels() is made


def test_to_moves_the_images_and_loses_nothing():
    whole = batch_of(3)
    moved = whole.to("meta")
    assert moved.images.device.type == "meta" and moved.targets is whole.targets
    assert (moved.image_ids, moved.paths, len(moved.targets)) == (whole.image_ids, whole.paths, 40)


def test_detections_can_be_chosen_from():
    found = Detections(boxes=torch.rand(3, 4), scores=torch.tensor([0.9, 0.5, 0.1]), labels=torch.tensor([2, 0, 1]))
    some = found.where(found.scores > 0.3)
    assert len(some) == 2 and some.labels.tolist() == [2, 0] and torch.equal(some.boxes, found.boxes[:2])
    assert len(found.where(found.scores > 1)) == 0
