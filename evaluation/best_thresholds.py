"""The scores with the best F1, the harmonic mean of precision and recall, at IoU 0.5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.matches import ClassMatches, Matches
from models.thresholds import Threshold, Thresholds

FEW_OBJECTS = 10  # a class with fewer takes the common confidence: its own would be chance


def best_thresholds(sets: Sequence[Matches]) -> Thresholds | None:
    """Return the best threshold for all classes in common, and that of each class that has objects.

    sets: matches on one or more data sets; classes of the same name are one. A class with few objects, or of which
    none was found, has the common confidence. Detections of all classes count alike in the common one. None if nothing
    was found.
    """
    of_name: dict[str, list[ClassMatches]] = {}
    for each in (each for matches in sets for each in matches.classes):
        of_name.setdefault(each.name, []).append(each)
    everything = [each for matches in sets for each in matches.classes]
    common = _best(everything)
    if common is None:
        return None
    classes = {}
    for name, parts in of_name.items():
        if (objects := _objects(parts)) > 0:
            own = _best(parts) if objects >= FEW_OBJECTS else None
            classes[name] = own or _at(parts, common.confidence)
    return Thresholds(common=common, classes=classes)


def _best(parts: Sequence[ClassMatches]) -> Threshold | None:
    """Return the threshold with the best F1, of equal ones the highest; None if no object is found at any.

    It lies between two scores, because images that look alike do not score alike.
    """
    scores, is_hit = _counted(parts)
    if not is_hit.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(is_hit[order])
    f1 = 2 * found / (np.arange(1, len(scores) + 1) + _objects(parts))
    (ends,) = np.nonzero(np.diff(scores, append=-np.inf))  # equal scores are kept or dropped together
    last = int(ends[np.argmax(f1[ends])])
    following = float(scores[last + 1]) if last + 1 < len(scores) else 0.0
    return _at(parts, (float(scores[last]) + following) / 2)


def _at(parts: Sequence[ClassMatches], confidence: float) -> Threshold:
    scores, is_hit = _counted(parts)
    is_kept = scores > confidence
    kept, found, objects = int(is_kept.sum()), int(is_hit[is_kept].sum()), _objects(parts)
    return Threshold(
        confidence=confidence,
        precision=found / kept if kept else 0.0,
        recall=found / objects,
        f1=2 * found / (kept + objects),
    )


def _counted(parts: Sequence[ClassMatches]) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and hits at IoU 0.5, (D,) each, of the detections that count."""
    counted = [~each.is_ignored[0] for each in parts]
    scores = [each.scores[keep] for each, keep in zip(parts, counted, strict=True)]
    hits = [each.is_hit[0][keep] for each, keep in zip(parts, counted, strict=True)]
    return np.concatenate([np.zeros(0), *scores]), np.concatenate([np.zeros(0, bool), *hits])


def _objects(parts: Sequence[ClassMatches]) -> int:
    return int(sum(each.objects.sum() for each in parts))
