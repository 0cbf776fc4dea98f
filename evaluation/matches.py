"""Which detections found an object, image by image: from this AP is computed for any choice of images, quickly.

Boxes are matched within an image, so a choice of images, some several times, needs no new matching; what is left of
COCOeval is its `accumulate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.coco_backends import coco_dataset, match_images
from evaluation.coco_results import CocoResults

_RECALLS = np.linspace(0, 1, 101)
_CELLS = 4_000_000  # numbers of one array: detections of a class by choices of images


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassMatches:
    """The detections of one class in all images, best first; of equal scores in the order of the images.

    images: (D,) int64, each one's image, counted from 0. scores: (D,) float64. is_hit: (T, D) bool by IoU threshold,
    true if it is the one that found an object. is_ignored: (T, D) bool, true if it lies in a crowd and does not count.
    objects: (I,) int64, how many objects each image has, crowds left out.
    """

    name: str
    images: np.ndarray
    scores: np.ndarray
    is_hit: np.ndarray
    is_ignored: np.ndarray
    objects: np.ndarray

    @classmethod
    def of(cls, name: str, results: Sequence[Mapping[str, Any]]) -> ClassMatches:
        """results: COCOeval's, of each image."""
        scores = np.concatenate([result["dtScores"] for result in results])
        order = np.argsort(-scores, kind="stable")
        is_matched, is_ignored = (
            np.concatenate([result[key] for result in results], axis=1).astype(bool)[:, order]
            for key in ("dtMatches", "dtIgnore")
        )
        return cls(
            name=name,
            images=np.repeat(np.arange(len(results)), [len(result["dtScores"]) for result in results])[order],
            scores=scores[order],
            is_hit=is_matched & ~is_ignored,
            is_ignored=is_ignored,
            objects=np.array([np.count_nonzero(np.equal(result["gtIgnore"], 0)) for result in results], np.int64),
        )

    def AP(self, counts: np.ndarray) -> np.ndarray:
        """Compute the AP of each choice of images. counts: (I, N) int64, how often each image is in each choice.

        Returns (N,), NaN for a choice without objects of the class.
        """
        objects = self.objects @ counts
        drawn = counts[self.images]
        counted = np.cumsum(drawn, axis=0)
        needed = _needed(objects)
        total = np.zeros(counts.shape[1])
        for is_hit, is_ignored in zip(self.is_hit, self.is_ignored, strict=True):
            # Precision is highest where something was found, so no other place matters; of copies only the last does.
            hits, ignored = np.flatnonzero(is_hit), np.flatnonzero(is_ignored)
            found = np.cumsum(drawn[hits], axis=0)
            before = np.cumsum(np.insert(drawn[ignored], 0, 0, axis=0), axis=0)[np.searchsorted(ignored, hits)]
            precision = found / (counted[hits] - before + np.spacing(1))
            best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
            reached = np.append(best, np.zeros_like(total)[None], axis=0)
            total += np.take_along_axis(reached, _first_at_least(found, needed), axis=0).mean(0)
        return np.where(objects > 0, total / len(self.is_hit), np.nan)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Matches:
    """The matches of all classes, by ascending category id, on the same images, by ascending image id."""

    classes: tuple[ClassMatches, ...]
    images: int

    @property
    def detections(self) -> int:
        return sum(len(each.scores) for each in self.classes)

    @property
    def images_with_objects(self) -> int:
        return int(np.count_nonzero(np.sum([each.objects for each in self.classes], axis=0)))

    def class_AP(self, counts: np.ndarray) -> np.ndarray:
        """Compute COCO's AP of each class for each choice of images; NaN for a class without objects in it.

        counts: (I, N) int64, how often each image is in each choice. Returns (N, C). It equals COCOeval's for a data
        set in which each copy is an image of its own, but for copies of detections of one image, class and score.
        """
        most = max((len(each.scores) for each in self.classes), default=0)
        parts = np.array_split(counts, -(-counts.shape[1] * max(most, 1) // _CELLS), axis=1)
        found = [np.stack([each.AP(part) for each in self.classes], axis=1) for part in parts if self.classes]
        return np.concatenate(found) if found else np.zeros((counts.shape[1], 0))

    def AP(self) -> float:
        """Compute COCO's AP of all images, each once; NaN without objects."""
        return float(mean_AP(self.class_AP(np.ones((self.images, 1), np.int64)))[0])


def mean_AP(class_AP: np.ndarray) -> np.ndarray:
    """(N, C) -> (N,): the mean over the classes that have objects, as COCO's; NaN where none has."""
    known = ~np.isnan(class_AP)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, class_AP, 0).sum(axis=1) / np.maximum(count, 1), np.nan)


def match_coco(ground_truth: Mapping[str, Any], results: CocoResults, image_ids: Sequence[int]) -> Matches:
    """Match results with ground truth, both in COCO's form, as `evaluate_coco` does with COCO's 100 detections."""
    truth = coco_dataset(ground_truth, ground_truth["annotations"])
    found = coco_dataset(ground_truth, results.rows())
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    if not image_ids:
        return Matches(classes=(), images=0)
    pairs = zip(categories, match_images(truth, found, image_ids), strict=True)
    classes = tuple(ClassMatches.of(category["name"], of_images) for category, of_images in pairs)
    return Matches(classes=classes, images=len(set(image_ids)))


def _needed(objects: np.ndarray) -> np.ndarray:
    """(N,) numbers of objects -> (101, N): the fewest that must be found for each recall, compared as COCOeval does."""
    some = np.maximum(objects, 1)
    needed = np.floor(_RECALLS[:, None] * some).astype(np.int64)
    needed -= (needed - 1) / some >= _RECALLS[:, None]
    needed += needed / some < _RECALLS[:, None]
    return needed


def _first_at_least(rising: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return in each column of `rising`, (P, N) int64, the first place that has at least `values`, (R, N); P if none.

    One search for all columns: each column begins above the end of the one before.
    """
    places, columns = rising.shape
    step = np.arange(columns) * (int(values.max(initial=0)) + int(rising.max(initial=0)) + 1)
    found = np.searchsorted((rising + step).T.ravel(), values + step)
    return np.asarray(np.clip(found - np.arange(columns) * places, 0, places))
