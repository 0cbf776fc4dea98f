import numpy as np
import torch

from data.loader import collate
from tests.data.test_augment import no_object, one_object
from utils.structures import Sample


def resized(sample: Sample) -> Sample:
    return Sample(
        image=np.ascontiguousarray(sample.image[:40, :48]),
        boxes=sample.boxes,
        labels=sample.labels,
        is_crowd=sample.is_crowd,
        image_id=sample.image_id,
        path=sample.path,
    )


def test_images_and_targets() -> None:
    samples = [resized(make(index)) for index, make in enumerate((one_object, no_object, one_object))]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 40, 48)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    for image, sample in zip(batch.images, samples, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), sample.image)
    assert batch.targets.image_index.tolist() == [0, 2]
    assert batch.targets.labels.tolist() == [0, 2]
    assert batch.image_ids == (0, 1, 2)
    assert batch.placements == (None, None, None)
    assert (batch.targets.boxes.dtype, batch.targets.labels.dtype) == (torch.float32, torch.int64)
    assert (batch.targets.image_index.dtype, batch.targets.is_crowd.dtype) == (torch.int64, torch.bool)


def test_no_objects_at_all() -> None:
    batch = collate([resized(no_object(0)), resized(no_object(1))])
    assert len(batch) == 2
    assert len(batch.targets) == 0
    assert batch.targets.boxes.shape == (0, 4)
