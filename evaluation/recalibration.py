"""Statistics of norms from a sample of images."""

from __future__ import annotations

from torch import Tensor

from data.image_set import ImageSet
from evaluation.inference import image_batches
from models.detector import Detector
from models.norms.recalibrate import recalibrate


def sample_images(
    image_set: ImageSet, detector: Detector, *, image_count: int, batch_size: int, workers: int
) -> list[Tensor]:
    """Return at most `image_count` images in random order, in batches (N, 3, H, W), uint8 or float, for `detector`."""
    batches = image_batches(detector, image_set.sample(image_count), batch_size=batch_size, workers=workers)
    # Cloned: tensors from a worker lie in shared memory, and each would keep a file descriptor open.
    return [batch.images.clone() for batch in batches]


def recalibrate_on(image_set: ImageSet, detector: Detector, *, image_count: int, batch_size: int, workers: int) -> str:
    """Give the detector's norms the statistics of a sample of images. Returns a description of these statistics."""
    images = sample_images(image_set, detector, image_count=image_count, batch_size=batch_size, workers=workers)
    network = detector.network
    recalibrate(network, images, but=network.layers[: network.frozen_layers])
    return f"statistics of {sum(map(len, images))} images of {image_set.name} {image_set.split}"
