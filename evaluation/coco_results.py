"""Detections in COCO's results form, as arrays: 5,000 images have half a million of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.structures import Detections, Placement


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CocoResults:
    """Detections of any number of images; those of one image best first.

    image_ids, category_ids: (D,) int64, the data set's. bboxes: (D, 4) float64 x, y, width, height in source pixels.
    scores: (D,) float64.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    bboxes: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def where(self, keep: np.ndarray) -> CocoResults:
        """Select by a mask (D,) bool, or by indices (D',) int64 in their order."""
        return CocoResults(
            image_ids=self.image_ids[keep],
            category_ids=self.category_ids[keep],
            bboxes=self.bboxes[keep],
            scores=self.scores[keep],
        )

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> CocoResults:
        """Return what `rows` was called on.

        Raises KeyError, TypeError, ValueError or OverflowError for anything else.
        """
        if not isinstance(rows, list):
            raise TypeError("it is no list")
        found = cls(
            image_ids=np.array([row["image_id"] for row in rows], np.int64),
            category_ids=np.array([row["category_id"] for row in rows], np.int64),
            bboxes=np.array([row["bbox"] for row in rows], np.float64).reshape(len(rows), 4),
            scores=np.array([row["score"] for row in rows], np.float64).reshape(len(rows)),
        )
        if not (np.isfinite(found.bboxes).all() and np.isfinite(found.scores).all()):
            raise ValueError("a box or score is not finite")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return the entries of a COCO results file."""
        columns = (self.image_ids, self.category_ids, self.bboxes, self.scores)
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}
            for image_id, category_id, bbox, score in zip(*(column.tolist() for column in columns), strict=True)
        ]


def results_of(
    detections: Detections,
    placement: Placement,
    image_id: int,
    category_ids: Mapping[int, int] | Sequence[int],
) -> CocoResults:
    """Convert one image's detections (input pixels) to COCO results (source pixels), in the same order.

    category_ids: label -> the data set's category id. Numbers are rounded to 1e-3 px and 1e-6 score, which halves the
    file: the AP of the results is also that of the file. A box wholly outside the source image, in the letterbox's
    border, yields no result.
    """
    found = detections.cpu()
    boxes = placement.to_source(found.boxes.detach().double().numpy())
    bboxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).round(3)
    labels, label_of_each = np.unique(found.labels.numpy(), return_inverse=True)
    categories = np.array([category_ids[label] for label in labels.tolist()], np.int64)
    results = CocoResults(
        image_ids=np.full(len(found), image_id, np.int64),
        category_ids=categories[label_of_each],
        bboxes=bboxes,
        scores=found.scores.detach().double().numpy().round(6),
    )
    return results.where((bboxes[:, 2:] > 0).all(axis=1))


def merged(parts: Sequence[CocoResults], image_ids: Sequence[int]) -> CocoResults:
    """Concatenate results of different images, found by any rank, in the order of `image_ids`."""
    nothing = CocoResults(
        image_ids=np.zeros(0, np.int64),
        category_ids=np.zeros(0, np.int64),
        bboxes=np.zeros((0, 4)),
        scores=np.zeros(0),
    )
    columns = CocoResults.__dataclass_fields__
    found = CocoResults(
        **{name: np.concatenate([getattr(part, name) for part in (nothing, *parts)]) for name in columns}
    )
    images = np.asarray(image_ids, np.int64)
    assert np.isin(found.image_ids, images).all(), "a part has an image that is not in image_ids"
    by_id = np.argsort(images)
    position = by_id[np.searchsorted(images, found.image_ids, sorter=by_id)]
    return found.where(np.argsort(position, kind="stable"))


def positions_by_image(image_ids: np.ndarray, images: Sequence[int]) -> list[np.ndarray]:
    """Return for each of `images` its positions in image_ids, ascending."""
    order = np.argsort(image_ids, kind="stable")
    starts, ends = (np.searchsorted(image_ids[order], images, side=side) for side in ("left", "right"))
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]
