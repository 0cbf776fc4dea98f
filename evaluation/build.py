"""A detector meets a data set: what train.py and evaluate.py both do with the two."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.image_set import ImageSet
from data.loader import InputLayout, make_eval_loader
from evaluation.coco_backends import choose_backend
from evaluation.darknet_map import CONFIDENCE, NMS_IOU, DarknetTable, evaluate_darknet
from evaluation.evaluator import Evaluator, category_of_label, detections_of
from models.detector import Detector
from models.norms.recalibrate import recalibrate
from utils import ranks
from utils.stop import Stop
from utils.structures import Batch, Detections

TRAINED_ON_VAL2017 = (
    "official YOLOv4 weights were trained on a part of val2017 (darknet's trainvalno5k holds 35,000 of the validation "
    "images of 2014): AP flatters them here"
)


def make_evaluator(
    detector: Detector,
    image_set: ImageSet,
    *,
    batch_size: int,
    workers: int,
    rect: bool = False,
    backend: str = "auto",
    stop: Stop | None = None,
) -> Evaluator:
    """rect: of `make_eval_loader`. backend: of evaluation.coco_backends.BACKENDS. stop: is heeded between batches.

    UserError where it is not installed, or the classes do not fit (`category_of_label`).
    """
    batches: Iterable[Batch] = _images_for(
        detector, image_set, batch_size=batch_size, workers=workers, is_shared=True, rect=rect
    )
    if stop is not None:
        batches = stop.interruptible(batches)
    return Evaluator(
        detect=replace(detector, max_detections=None),
        batches=batches,
        class_names=detector.class_names,
        ground_truth=image_set.ground_truth(),
        image_ids=image_set.image_ids,
        categories=category_of_label(detector.class_names, image_set.class_names, image_set.category_ids),
        device=detector.device,
        is_coco=image_set.coco_json is not None,
        max_detections=detector.max_detections,
        backend=choose_backend(backend),
    )


def measure_as_darknet(
    detector: Detector, image_set: ImageSet, *, iou: float, points: int, batch_size: int, workers: int
) -> DarknetTable:
    """darknet's AP (`evaluation/darknet_map.py`), in a pass of its own, with thresholds of its own.

    UserError where the classes do not fit (`category_of_label`).
    """
    category_of_label(detector.class_names, image_set.class_names, image_set.category_ids)
    labels = torch.tensor([detector.class_names.index(name) for name in image_set.class_names])
    detector = replace(detector, confidence=CONFIDENCE, nms_iou=NMS_IOU, max_detections=None)
    loader = _images_for(detector, image_set, batch_size=batch_size, workers=workers)

    def image_count() -> Iterator[tuple[Detections, Tensor, Tensor]]:
        """In input pixels: IoU is the same there."""
        for batch, found in detections_of(detector, loader, device=detector.device, relative=True, progress=True):
            for index, detections in enumerate(found):
                truths = batch.targets.of_images(index, index + 1)
                yield detections, truths.boxes, labels[truths.labels]

    return evaluate_darknet(image_count(), detector.class_names, iou=iou, points=points)


def may_have_trained_on(cfg_name: str, classes: int, places: Sequence[str]) -> bool:
    """Whether darknet's weights of this cfg, if they are the official ones, know images of this data set.

    places: names and paths of the data set. Official YOLOv4 weights are trained on darknet's COCO list trainvalno5k.
    """
    return "yolov4" in cfg_name and classes == 80 and any("val2017" in place for place in places)


def places_of(image_set: ImageSet) -> tuple[str, ...]:
    """Where a data set is from: its name, its annotation file, the folder of its first image."""
    return image_set.name, image_set.coco_json or "", os.path.dirname(image_set[0].path)


def sample_images(
    image_set: ImageSet, detector: Detector, *, image_count: int, batch_size: int, workers: int
) -> list[Tensor]:
    """At most so many images of the set, as `detector` sees them: (N, 3, H, W), uint8 or float, in random order."""
    loader = _images_for(detector, image_set.sample(image_count), batch_size=batch_size, workers=workers)
    # Copies: what a worker made lies in shared memory, of which a file descriptor each would stay open.
    return [batch.images.clone() for batch in loader]


def recalibrate_on(image_set: ImageSet, detector: Detector, *, image_count: int, batch_size: int, workers: int) -> str:
    """The detector's norms take the statistics of a sample of images -> what they are of, in words."""
    images = sample_images(image_set, detector, image_count=image_count, batch_size=batch_size, workers=workers)
    network = detector.network
    recalibrate(network, images, but=network.layers[: network.frozen_layers])
    return f"statistics of {sum(map(len, images))} images of {image_set.name} {image_set.split}"


def _images_for(
    detector: Detector,
    image_set: ImageSet,
    *,
    batch_size: int,
    workers: int,
    is_shared: bool = False,
    rect: bool = False,
) -> Iterable[Batch]:
    """All images, as `detector` sees them; is_shared: this rank's share of them."""
    share = {"rank": ranks.rank(), "ranks": ranks.world_size()} if is_shared else {}
    layout = InputLayout(detector.input_hw, detector.letterbox, detector.resize, rect, detector.size_step_px)
    return make_eval_loader(image_set, layout, batch_size=batch_size, workers=workers, **share)
