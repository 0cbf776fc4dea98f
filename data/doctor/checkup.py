"""All that is looked for in the splits of a data set: quickly before a training, or with every image decoded."""

from __future__ import annotations

from collections.abc import Sequence

from data.doctor.classes import class_findings
from data.doctor.duplicates import path_digests, quick_digests, same_bytes, same_look
from data.doctor.finding import Finding
from data.doctor.images import image_findings, scan_images
from data.doctor.labels import label_findings
from data.image_set import ImageSet

# Up to so many images, a few bytes of each are read in the quick part: 0.05 ms each where the disk is cached, but
# several ms on a slow one. Of more, only the paths are compared.
_QUICKLY_READ = 20_000


def quick_checkup(image_sets: Sequence[ImageSet]) -> list[Finding]:
    """Labels, classes, and images that are there twice; no image is decoded.

    image_sets: first the one that is trained on.
    """
    few = sum(map(len, image_sets)) <= _QUICKLY_READ
    digests = [(quick_digests if few else path_digests)(image_set) for image_set in image_sets]
    return [*_of_labels(image_sets), *same_bytes(image_sets, digests)]


def full_checkup(image_sets: Sequence[ImageSet], threads: int) -> list[Finding]:
    """Of every image, too, whether it opens, its size and its look. With progress bars."""
    found = _of_labels(image_sets)
    scans = []
    for image_set in image_sets:
        scans.append(scan_images(image_set, threads))
        found += image_findings(image_set, scans[-1])
    digests, looks = [scan.digests for scan in scans], [scan.looks for scan in scans]
    return [*found, *same_bytes(image_sets, digests), *same_look(image_sets, digests, looks)]


def quick_findings(train_set: ImageSet, val_set: ImageSet) -> list[str]:
    """What a training should say about its data before it begins: a line for each finding that is a defect."""
    return [each.line() for each in quick_checkup((train_set, val_set)) if not each.is_note]


def _of_labels(image_sets: Sequence[ImageSet]) -> list[Finding]:
    found = [finding for image_set in image_sets for finding in label_findings(image_set)]
    return [*found, *class_findings(image_sets)]
