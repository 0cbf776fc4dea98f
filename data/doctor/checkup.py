"""All checks of the splits of a data set: quickly before a training, or with every image decoded."""

from __future__ import annotations

from collections.abc import Sequence

from data.doctor.classes import class_findings
from data.doctor.duplicates import quick_digests, same_bytes
from data.doctor.finding import Finding
from data.doctor.images import image_findings, scan_images
from data.doctor.labels import label_findings
from data.image_set import ImageSet
from data.problems import OTHER_SIZE

# Up to this many images, the quick checkup reads a few bytes of each: 0.05 ms from a cached disk, but several ms from
# a slow one. Of more, only the paths are compared.
_QUICKLY_READ = 20_000


def quick_checkup(image_sets: Sequence[ImageSet], *, classes: bool = True) -> list[Finding]:
    """Check labels, classes and duplicate images without decoding any. image_sets: the training split first.

    classes: whether to compare what the classes list with what objects there are.
    """
    few = sum(map(len, image_sets)) <= _QUICKLY_READ
    digests = [quick_digests(image_set) if few else image_set.paths.tolist() for image_set in image_sets]
    return [*_annotation_findings(image_sets, classes), *same_bytes(image_sets, digests)]


def full_checkup(image_sets: Sequence[ImageSet], threads: int) -> list[Finding]:
    """Check also whether each image opens, and its size. Shows progress bars."""
    # Readers look at the headers of some images, the scan at all.
    findings = [each for each in _annotation_findings(image_sets) if each.kind != OTHER_SIZE]
    digests = []
    for image_set in image_sets:
        scan = scan_images(image_set, threads)
        findings += image_findings(image_set, scan)
        digests.append(scan.digests)
    return [*findings, *same_bytes(image_sets, digests)]


def quick_findings(*image_sets: ImageSet) -> list[str]:
    """Return one line per defect that the quick checkup finds, for the start of a training, or of an evaluation."""
    findings = quick_checkup(image_sets, classes=len(image_sets) > 1)
    return [each.line() for each in findings if not each.is_note]


def _annotation_findings(image_sets: Sequence[ImageSet], classes: bool = True) -> list[Finding]:
    findings = [finding for image_set in image_sets for finding in label_findings(image_set)]
    return [*findings, *(class_findings(image_sets) if classes else ())]
