"""What is odd about the boxes of one split."""

from __future__ import annotations

import numpy as np
import torch

from data import problems
from data.augment import AugmentOptions
from data.box_sizes import owners
from data.doctor.finding import Finding, described
from data.image_set import ImageSet
from utils.boxes import elementwise_iou

NO_OBJECT = ("image, which has no object", "images, none of which has an object")
REPEATED_BOX = ("box drawn twice", "boxes drawn twice")

# Two neighbours of one class never overlap so far; annotators who drew one object twice mostly do.
REPEATED_IOU = 0.95

SWAPPED_ADVICE = (
    "No EXIF tag turns it, so its boxes are taken as they lie in the image. Look at a few, and correct the written "
    "size."
)
_OF_READERS = {
    problems.MISSING_IMAGE: "Listed, but not there: its objects are not learned. Restore it, or unlist it.",
    problems.BROKEN_IMAGE: "Its first bytes are no image's; its objects are not learned. Restore or remove it.",
    problems.BROKEN_ANNOTATION: "Nobody knows what the image shows, so it is left out. Mend the file, or take it "
    "off the list.",
    problems.BROKEN_LABEL: "The object is not learned, and counts as background. Mend the line.",
    problems.NO_BBOX: "Polygons and masks are not read: the object is not learned, and counts as background. Write the "
    "bbox [left, top, width, height] that encloses it.",
    problems.UNKNOWN_CLASS: "The object is not learned, and counts as background. Mend the class, or add it to the "
    "list of classes.",
    problems.NO_AREA: "A box needs 1 px of both sides; the object is not learned, and counts as background. Draw it "
    "anew, or delete it.",
    problems.OUTSIDE: "Nothing of the object can be seen, so it is not learned. Of many, the labels may be for "
    "another size of the images; delete single ones.",
    problems.CLIPPED: "They are learned as far as the image reaches. If they reach far out, the labels may be for "
    "another size of the images; else nothing is lost.",
    problems.SWAPPED_SIZE: SWAPPED_ADVICE,
}
_NO_OBJECT = "There is nothing to learn or to measure here. See whether the labels are where they are looked for."
_REPEATED = (
    f"One class, IoU of at least {REPEATED_IOU:g}: whoever finds the object once has missed it once, and learns it "
    "with double weight. Delete one of the two."
)
_TINY = (
    "Training leaves them out, evaluation counts them as missed. If they matter: a larger --image-size, or images "
    "cut into tiles."
)


def label_findings(image_set: ImageSet) -> list[Finding]:
    where = image_set.split
    found = [
        Finding(kind=kind, where=where, count=count, advice=_OF_READERS[kind], places=_kept(image_set, kind))
        for kind, count in image_set.problems.counts.items()
    ]
    if image_set.is_crowd.all():
        found.append(Finding(kind=NO_OBJECT, where=where, count=len(image_set), advice=_NO_OBJECT))
    repeated = repeated_boxes(image_set)
    if len(repeated):
        places = _places(image_set, repeated)
        found.append(Finding(kind=REPEATED_BOX, where=where, count=len(repeated), advice=_REPEATED, places=places))
    return found


def tiny_findings(image_set: ImageSet, sides: np.ndarray) -> list[Finding]:
    """sides: (M, 2) of `input_sides`."""
    least_px = AugmentOptions().min_side_px
    tiny = np.flatnonzero((sides < least_px).any(axis=1) & ~image_set.is_crowd)
    if not len(tiny):
        return []
    ending = f"with a side below {least_px:g} px at the network's input"
    kind, places = (f"box {ending}", f"boxes {ending}"), _places(image_set, tiny)
    return [Finding(kind=kind, where=image_set.split, count=len(tiny), advice=_TINY, places=places, is_note=True)]


def repeated_boxes(image_set: ImageSet) -> np.ndarray:
    """(K,) the objects, crowds aside, that nearly equal another one of their class and image: of two, one.

    Sorted by left side, an object and its double are close: a ratio of widths and overlap is never below the IoU,
    so that with an IoU of t their left sides differ by at most (1 - t) / t of a width.
    """
    single = np.flatnonzero(~image_set.is_crowd)
    boxes, labels, images = image_set.boxes[single], image_set.labels[single], owners(image_set)[single]
    order = np.lexsort((boxes[:, 0], labels, images))
    boxes, labels, images = boxes[order].astype(np.float64), labels[order], images[order]
    reach = boxes[:, 0] + (boxes[:, 2] - boxes[:, 0]) * (1 - REPEATED_IOU) / REPEATED_IOU
    repeated = np.zeros(len(single), bool)
    first = np.arange(len(single))
    for step in range(1, len(single)):
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


def _kept(image_set: ImageSet, kind: tuple[str, str]) -> tuple[str, ...]:
    return tuple(image_set.problems.examples[kind])


def _places(image_set: ImageSet, items: np.ndarray) -> tuple[str, ...]:
    images = np.searchsorted(image_set.starts, items, side="right") - 1
    pairs = zip(images.tolist(), items.tolist(), strict=True)
    return tuple(described(image_set, image, item) for image, item in pairs)
