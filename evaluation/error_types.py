"""TIDE's six error types (Bolya et al. 2020, arXiv:2008.08115): what is wrong with detections, and the AP it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask

from evaluation.coco_results import CocoResults, positions_by_image

ERROR_TYPES = ("classification", "localization", "both", "duplicate", "background", "missed")
CORRECT, UNJUDGED = -1, -2  # a detection that is no error, one beyond the best `max_detections` of its image
_CLASSIFICATION, _LOCALIZATION, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(6)
_POSITIVE_IOU, _BACKGROUND_IOU = 0.5, 0.1  # the paper's t_f and t_b
_RECALLS = np.arange(101) / 100


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ErrorAnalysis:
    """What is wrong with D detections of M annotated objects.

    AP: at IoU 0.5, in 0..1, as TIDE averages it: over the classes with an object or a detection. costs: by error type,
    what AP would gain if its errors were corrected and nothing else. counts: errors by type.

    types: (D,) an index of ERROR_TYPES, CORRECT or UNJUDGED. is_ignored: (D,) whether AP leaves an error out, as it
    lies in a crowd of its class. found: (D,) the annotation that a correct detection found, else -1. is_missed: (M,)
    objects that no detection found and that correcting a class or a box would not find either.
    """

    AP: float
    costs: dict[str, float]
    counts: dict[str, int]
    types: np.ndarray
    is_ignored: np.ndarray
    found: np.ndarray
    is_missed: np.ndarray


def find_errors(ground_truth: Mapping[str, Any], results: CocoResults, *, max_detections: int = 100) -> ErrorAnalysis:
    """Sort the errors of detections by type. ground_truth: in COCO form; its images are those that are measured.

    The best `max_detections` of an image count, of all classes together. A detection finds the object of its class, not
    yet found by a better one, that it overlaps most, from an IoU of 0.5 on. The paper's section 2.2 has the types, and
    2.3 the corrections: a wrong class or box is corrected if its object was not found, once an object; whatever else
    such a correction would touch is taken out.
    """
    rows = ground_truth["annotations"]
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    classes = np.array([row["category_id"] for row in rows], np.int64)
    is_crowd = np.array([bool(row.get("iscrowd", 0)) for row in rows], bool)
    images = [image["id"] for image in ground_truth["images"]]
    annotated = positions_by_image(np.array([row["image_id"] for row in rows], np.int64), images)
    detected = positions_by_image(results.image_ids, images)

    total = len(results)
    types, found, wanted = np.full(total, UNJUDGED), np.full(total, -1), np.full(total, -1)
    is_ignored = np.zeros(total, bool)
    order: list[np.ndarray] = []  # of judged detections: by image, best first; of equal scores the earlier counts first
    for here, own in zip(detected, annotated, strict=True):
        here = here[np.argsort(-results.scores[here], kind="stable")][:max_detections]
        objects, crowds = own[~is_crowd[own]], own[is_crowd[own]]
        order.append(here)
        if not len(here):
            continue
        ious = _iou(results.bboxes[here], boxes[objects], crowd=False)
        same = results.category_ids[here, None] == classes[objects]
        match = _match(ious * same)
        types[here], target = _types(ious, same, match)
        found[here] = np.append(objects, -1)[match]
        wanted[here] = np.append(objects, -1)[target]
        inside = _iou(results.bboxes[here], boxes[crowds], crowd=True) > _POSITIVE_IOU
        in_own_crowd = (inside & (results.category_ids[here, None] == classes[crowds])).any(axis=1)
        is_ignored[here] = (match < 0) & in_own_crowd

    judged = np.concatenate([np.zeros(0, np.int64), *order])
    is_found = np.zeros(len(rows), bool)
    is_found[found[found >= 0]] = True
    # An object can be had once: by the best detection of those that want it. A found one is not for sale.
    claims = judged[wanted[judged] >= 0]
    claims = claims[~is_found[wanted[claims]]]
    claimed, first = np.unique(wanted[claims], return_index=True)
    is_mended = np.zeros(total, bool)
    is_mended[claims[first]] = True
    is_missed = ~is_crowd & ~is_found
    is_missed[claimed] = False

    positives = dict(zip(*np.unique(classes[~is_crowd], return_counts=True), strict=True))
    scores, labels = results.scores[judged], results.category_ids[judged]
    is_true, kinds = types[judged] == CORRECT, types[judged]
    counted = is_true | ~is_ignored[judged]
    ap = _mean_ap(scores[counted], labels[counted], is_true[counted], positives)
    costs = {}
    for number, name in enumerate(ERROR_TYPES):
        left, now_true, now_label = positives, is_true.copy(), labels.copy()
        keep = counted & (kinds != number)
        if number in (_CLASSIFICATION, _LOCALIZATION):
            mended = (kinds == number) & is_mended[judged]
            keep, now_true = keep | mended, now_true | mended
            now_label[mended] = classes[wanted[judged[mended]]]
        if number == _MISSED:
            left = {label: count - (is_missed & (classes == label)).sum() for label, count in positives.items()}
        # Of equal scores, those that were errors count first here: so does tidecv, and it can be seen in AP.
        kept = np.flatnonzero(keep)
        kept = kept[np.argsort(is_true[kept], kind="stable")]
        costs[name] = max(0.0, _mean_ap(scores[kept], now_label[kept], now_true[kept], left) - ap)
    counts = {name: int((types == number).sum()) for number, name in enumerate(ERROR_TYPES)}
    counts["missed"] = int(is_missed.sum())
    return ErrorAnalysis(
        AP=ap, costs=costs, counts=counts, types=types, is_ignored=is_ignored, found=found, is_missed=is_missed
    )


def _types(ious: np.ndarray, same: np.ndarray, match: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (D,) the error types, and (D,) the object that a corrected class or box would find, or -1.

    ious, same: (D, M), the overlaps with an image's objects and whether the class is theirs. match: (D,), see `_match`.
    """
    target = np.full(len(ious), -1)
    if not ious.shape[1]:
        return np.full(len(ious), _BACKGROUND), target
    is_found = np.zeros(ious.shape[1], bool)
    is_found[match[match >= 0]] = True
    own, others = ious * same, ious * ~same
    best, best_other = own.max(axis=1), others.max(axis=1)
    conditions = {  # the first that is true
        CORRECT: match >= 0,
        _LOCALIZATION: (best >= _BACKGROUND_IOU) & (best <= _POSITIVE_IOU),
        _CLASSIFICATION: best_other >= _POSITIVE_IOU,
        _DUPLICATE: (own * is_found).max(axis=1) >= _POSITIVE_IOU,
        _BACKGROUND: ious.max(axis=1) <= _BACKGROUND_IOU,
    }
    types = np.select(list(conditions.values()), list(conditions), _BOTH)
    target = np.where(types == _LOCALIZATION, own.argmax(axis=1), target)
    return types, np.where(types == _CLASSIFICATION, others.argmax(axis=1), target)


def _match(ious: np.ndarray) -> np.ndarray:
    """Match detections, best first, with objects by (D, M) overlaps, 0 for other classes: (D,) indices, or -1."""
    match = np.full(len(ious), -1)
    free = ious.copy()
    for number in np.flatnonzero((ious >= _POSITIVE_IOU).any(axis=1)):
        best = int(free[number].argmax())
        if free[number, best] >= _POSITIVE_IOU:
            match[number] = best
            free[:, best] = 0
    return match


def _mean_ap(scores: np.ndarray, labels: np.ndarray, is_true: np.ndarray, positives: Mapping[int, int]) -> float:
    """Return the mean AP over classes. positives: objects by class. A class that is detected only has an AP of 0."""
    aps = []
    for label in sorted({*labels.tolist(), *(label for label, count in positives.items() if count)}):
        own = np.flatnonzero(labels == label)
        own = own[np.argsort(-scores[own], kind="stable")]
        aps.append(_ap(is_true[own], positives.get(label, 0)))
    return float(np.mean(aps)) if aps else 0.0


def _ap(is_true: np.ndarray, positives: int) -> float:
    """Return COCO's AP at one IoU: precision, made monotonous, at the recalls 0, 0.01 ... 1. is_true: best first."""
    if not positives:
        return 0.0
    true = is_true.cumsum()
    precision = np.maximum.accumulate((true / np.arange(1, len(true) + 1))[::-1])[::-1]
    places = np.searchsorted(true / positives, _RECALLS)
    return float(np.append(precision, 0)[places].mean())


def _iou(boxes: np.ndarray, others: np.ndarray, *, crowd: bool) -> np.ndarray:
    """(D, 4), (M, 4) xywh -> (D, M) IoU as COCO computes it; with a crowd, the share of the box that lies within."""
    if not len(others):
        return np.zeros((len(boxes), 0))
    return np.asarray(mask.iou(boxes, others, [crowd] * len(others)))
