"""A detector meets a data set: what train.py and evaluate.py both do with the two."""

from __future__ import annotations

from torch import Tensor

from data.image_set import ImageSet
from data.loader import make_eval_loader
from models.detector import Detector
from models.norms.recalibrate import recalibrate
from utils.scoring import Examiner, category_of_label


def make_examiner(detector: Detector, image_set: ImageSet, *, batch_size: int, workers: int) -> Examiner:
    """UserError where the classes do not fit (`category_of_label`)."""
    loader = make_eval_loader(
        image_set,
        batch_size=batch_size,
        input_hw=detector.input_hw,
        letterbox=detector.letterbox,
        workers=workers,
    )
    return Examiner(
        detect=detector,
        batches=loader,
        class_names=detector.class_names,
        ground_truth=image_set.ground_truth(),
        image_ids=image_set.image_ids,
        categories=category_of_label(detector.class_names, image_set.class_names, image_set.category_ids),
        device=detector.device,
        is_coco=image_set.coco_json is not None,
    )


def sample_images(
    image_set: ImageSet, detector: Detector, *, pictures: int, batch_size: int, workers: int
) -> list[Tensor]:
    """At most so many pictures of the set, laid out as for `detector`: (N, 3, H, W) uint8 each, in random order."""
    loader = make_eval_loader(
        image_set.sample(pictures),
        batch_size=batch_size,
        input_hw=detector.input_hw,
        letterbox=detector.letterbox,
        workers=workers,
    )
    return [batch.images for batch in loader]


def recalibrate_on(image_set: ImageSet, detector: Detector, *, pictures: int, batch_size: int, workers: int) -> str:
    """The detector's norms take the statistics of a sample of pictures -> what they are of, in words."""
    images = sample_images(image_set, detector, pictures=pictures, batch_size=batch_size, workers=workers)
    recalibrate(detector.network, images)
    return f"statistics of {sum(map(len, images))} pictures of {image_set.name} {image_set.split}"
