"""Checks of the boxes of one split."""

from __future__ import annotations

import numpy as np
import torch

from data import problems
from data.augment_options import AugmentOptions
from data.doctor.finding import Finding, described, findings_at
from data.image_set import ImageSet
from utils.boxes import elementwise_iou

NO_OBJECT = ("image, which has no object", "images, none of which has an object")
REPEATED_BOX = ("box drawn twice", "boxes drawn twice")

COUNTED = 100  # detections of an image and class that COCO's AP takes

# Two neighbours of one class never overlap this far; boxes of one object that was annotated twice mostly do.
REPEATED_IOU = 0.95

_NEIGHBOURS = 200  # objects to the right of one that are compared with it

SWAPPED_ADVICE = (
    "No EXIF tag turns it, so its boxes are used as they lie in the image. Look at a few, and correct the annotated "
    "size."
)
OTHER_SIZE_ADVICE = (
    "Right only if the boxes were drawn at the annotated size. Look at a few; if they are off, correct that size."
)
_ADVICE = {
    problems.MISSING_IMAGE: "Listed, but absent: its objects are not learned. Restore it, or take it off the list.",
    problems.BROKEN_IMAGE: "Its first bytes are no image header; its objects are not learned. Restore or remove it.",
    problems.BROKEN_ANNOTATION: "Without it the image has unknown objects, so it is left out. Repair the file, or "
    "take it off the list.",
    problems.NO_ANNOTATION: "Nothing says what it shows. If that is no object, write an .xml without <object>.",
    problems.BROKEN_LABEL: "The object is not learned, and counts as background. Correct the line.",
    problems.NO_BBOX: "Polygons and masks are not read: the object is not learned, and counts as background. Write the "
    "bbox [left, top, width, height] that encloses it.",
    problems.UNKNOWN_CLASS: "The object is not learned, and counts as background. Correct the class, or add it to the "
    "list of classes.",
    problems.NO_AREA: "Both sides of a box need 1 px; the object is not learned, and counts as background. Draw it "
    "again, or delete it.",
    problems.OUTSIDE: "The object is not visible, so it is not learned. If there are many, the labels may be for "
    "images of another size; delete single ones.",
    problems.CLIPPED: "Their visible parts are learned. If they reach far out, the labels may be for images of "
    "another size; otherwise nothing is lost.",
    problems.SWAPPED_SIZE: SWAPPED_ADVICE,
    problems.OTHER_SIZE_BOXES: SWAPPED_ADVICE,
    problems.OTHER_SIZE: OTHER_SIZE_ADVICE,
    problems.REPEATED_LINE: "Nothing is lost: the object is there once. Delete the repeated lines.",
    problems.NO_LABEL_FILE: "Every image counts as one without objects. Put the label files where they are looked for.",
    problems.LEFT_FOLDER: "By `..`. If that is not meant, correct the path.",
    problems.FOUND_ELSEWHERE: "Its path is of another machine or in other letters. Nothing is lost.",
    problems.POLYGON: "A detector learns upright boxes. Nothing is to do.",
    problems.SIXTH_NUMBER: "It is taken for the score of a detection, as detect.py --save-txt writes it.",
    problems.KEYPOINTS: "A detector learns the boxes. Nothing is to do.",
    problems.NO_CLASS: "Some tools write it in front of the classes. Nothing is to do.",
    problems.OTHER_FILES: "Their endings are none of images that can be read. Convert those that are images.",
    problems.HELD_OUT: "No list says which images are for validation, so a hash of their names does.",
}
_NO_OBJECT = "There is nothing to learn or to measure. Check that the labels are where the reader expects them."
_REPEATED = (
    f"One class, IoU of at least {REPEATED_IOU:g}: the object is learned with double weight, and one of its two boxes "
    "always counts as missed. Delete one of them."
)
_CROWDED = (
    "Detections beyond are not counted, however good. evaluate.py --max-detections N adds a table that counts N; or "
    "cut the images into tiles."
)
_TINY = (
    "Training leaves them out, evaluation counts them as missed. If they matter, use a larger --image-size, or cut the "
    "images into tiles."
)


def label_findings(image_set: ImageSet) -> list[Finding]:
    """Return the reader's problems, a split without objects, and boxes drawn twice."""
    where, problem_places = image_set.split, image_set.problems.examples
    findings = [
        Finding(
            kind=kind,
            where=where,
            count=count,
            advice=_ADVICE[kind],
            places=tuple(problem_places[kind]),
            is_note=kind in problems.NOTES,
        )
        for kind, count in image_set.problems.counts.items()
    ]
    if image_set.is_crowd.all():
        findings.append(Finding(kind=NO_OBJECT, where=where, count=len(image_set), advice=_NO_OBJECT))
    findings += _crowded(image_set)
    return findings + findings_at(_places(image_set, repeated_boxes(image_set)), REPEATED_BOX, where, _REPEATED)


def _crowded(image_set: ImageSet) -> list[Finding]:
    """Find images with more objects than COCO's AP can count."""
    counts = np.bincount(image_set.owners[~image_set.is_crowd], minlength=len(image_set))
    crowded = np.flatnonzero(counts > COUNTED)
    limit = f"so AP on them all is at most {highest_ap(image_set):.3f}"
    ending = f"with more than {COUNTED} objects: COCO's AP counts the {COUNTED} best detections of each, {limit}"
    places = [f"{image_set[image].path}: {counts[image]} objects" for image in crowded.tolist()]
    return findings_at(places, (f"image {ending}", f"images {ending}"), image_set.split, _CROWDED)


def highest_ap(image_set: ImageSet) -> float:
    """Return COCO's AP of a perfect detector; COCO counts its best `COUNTED` detections of an image and class.

    An upper bound, as an image of several classes may have more than that in all of them together.
    """
    single = ~image_set.is_crowd
    cells = image_set.owners[single] * np.int64(len(image_set.class_names)) + image_set.labels[single]
    cell, count = np.unique(cells, return_counts=True)
    labels = cell % max(1, len(image_set.class_names))
    total, counted = np.bincount(labels, count), np.bincount(labels, np.minimum(count, COUNTED))
    recall = counted[total > 0] / total[total > 0]
    points = np.linspace(0, 1, 101)  # at which COCO reads the precision, which is 1 up to the recall
    return float((points <= recall[:, None] + 1e-9).mean()) if len(recall) else 0.0


def tiny_findings(image_set: ImageSet, sides: np.ndarray) -> list[Finding]:
    """Find boxes too small for training. sides: (M, 2) from `input_sides`."""
    least_px = AugmentOptions().min_side_px
    tiny = np.flatnonzero((sides < least_px).any(axis=1) & ~image_set.is_crowd)
    ending = f"with a side below {least_px:g} px at the network's input"
    kind = (f"box {ending}", f"boxes {ending}")
    return findings_at(_places(image_set, tiny), kind, image_set.split, _TINY, is_note=True)


def repeated_boxes(image_set: ImageSet) -> np.ndarray:
    """Return (K,) the indices of objects, without crowds, that nearly equal an earlier one of their class and image.

    Sorted by left side, an object and its double are close: the IoU is at most the ratio of intersection and width, so
    with an IoU of t their left sides differ by at most (1 - t) / t of a width.
    """
    single = np.flatnonzero(~image_set.is_crowd)
    boxes, labels, images = image_set.boxes[single], image_set.labels[single], image_set.owners[single]
    order = np.lexsort((boxes[:, 0], labels, images))
    boxes, labels, images = boxes[order].astype(np.float64), labels[order], images[order]
    reach = boxes[:, 0] + (boxes[:, 2] - boxes[:, 0]) * (1 - REPEATED_IOU) / REPEATED_IOU
    repeated = np.zeros(len(single), bool)
    first = np.arange(len(single))
    for step in range(1, min(len(single), _NEIGHBOURS)):
        first = first[first + step < len(single)]
        second = first + step
        near = (images[first] == images[second]) & (labels[first] == labels[second])
        first = first[near & (boxes[second, 0] <= reach[first])]
        if not len(first):
            break
        second = first + step
        iou = elementwise_iou(torch.from_numpy(boxes[first]), torch.from_numpy(boxes[second]))
        repeated[second] |= (iou >= REPEATED_IOU).numpy()
    return np.sort(single[order[repeated]])


def _places(image_set: ImageSet, items: np.ndarray) -> list[str]:
    images = image_set.owners[items]
    return [described(image_set, image, item) for image, item in zip(images.tolist(), items.tolist(), strict=True)]
