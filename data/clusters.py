"""Clustering of box shapes into anchors (k-medians with distance 1 - IoU), and how well anchors cover boxes.

Source: Redmon, Farhadi, YOLO9000 (arXiv:1612.08242), section 2, "Dimension Clusters". A cluster's centre is its median
width and height: with the means, the mean IoU is lower by 0.004 for six clusters of BCCD's boxes, and by 0.017 for
nine clusters of a few hundred boxes of COCO.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from utils import boxes
from utils.errors import UserError

# Usual limits: a box counts as found above 0.5; above 0.213, iou_thresh of yolov4.cfg, an anchor is responsible for an
# object in addition to the best one.
RECALL_LIMITS = (0.5, 0.213)
RESTARTS = 10
MAX_ROUNDS = 200  # about forty are needed
MAX_SHAPES = 20_000  # of more, every n-th by width is clustered


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeFit:
    """IoU of each box's shape with its best anchor: the mean, and the shares of boxes above limits."""

    mean_iou: float
    recall: tuple[float, ...]


def shape_iou(shapes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Return the IoU (M, A) of boxes that share their centre, from widths and heights (M, 2) and (A, 2)."""
    return boxes.shape_iou(torch.from_numpy(shapes), torch.from_numpy(anchors)).numpy()


def best_iou(shapes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Return (M,) the IoU of each shape (M, 2) with its best anchor."""
    return shape_iou(shapes, anchors).max(axis=1)


def measure_fit(overlaps: np.ndarray, limits: tuple[float, ...]) -> ShapeFit:
    """Summarize overlaps (M,) from `best_iou`, M > 0."""
    return ShapeFit(mean_iou=float(overlaps.mean()), recall=tuple(float((overlaps > limit).mean()) for limit in limits))


def cluster_shapes(shapes: np.ndarray, count: int, *, start: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """(M, 2) widths and heights -> (count, 2) anchors by ascending area, with the highest mean IoU found.

    The result does not depend on the order of `shapes`. start: (count, 2), one more initial solution; the result is at
    least as good. Raises UserError if there are fewer different shapes than clusters.
    """
    shapes = np.asarray(shapes, np.float64)
    shapes = shapes[np.lexsort((shapes[:, 1], shapes[:, 0]))]
    different = len(np.unique(shapes, axis=0))
    if different < count:
        raise UserError(
            f"{count} anchors need boxes of at least as many different shapes, and there are {different} "
            f"({len(shapes)} boxes)"
        )
    shapes = shapes[:: -(-len(shapes) // MAX_SHAPES)]
    starts = [_initial_anchors(shapes, count, np.random.default_rng([seed, restart])) for restart in range(RESTARTS)]
    if start is not None:
        starts.append(np.asarray(start, np.float64))
    anchors, _ = max((_converge(shapes, each) for each in starts), key=lambda result: result[1])
    return anchors[np.argsort(anchors.prod(axis=1), kind="stable")]


def _initial_anchors(shapes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw (count, 2) of the shapes, with probability proportional to the distance from those before (k-means++)."""
    chosen = [shapes[rng.integers(len(shapes))]]
    distance = np.ones(len(shapes))
    for _ in range(count - 1):
        distance = np.minimum(distance, 1 - shape_iou(shapes, chosen[-1][None])[:, 0])
        weight = distance.clip(np.finfo(np.float64).tiny)  # if all distances are 0, any shape will do
        chosen.append(shapes[rng.choice(len(shapes), p=weight / weight.sum())])
    return np.stack(chosen)


def _converge(shapes: np.ndarray, anchors: np.ndarray) -> tuple[np.ndarray, float]:
    """Run k-medians. Returns the best anchors of all rounds (a round may lose a little) and their mean IoU."""
    best, best_mean, assigned = anchors, -1.0, None
    for _ in range(MAX_ROUNDS):
        overlaps = shape_iou(shapes, anchors)
        nearest, covered = overlaps.argmax(axis=1), overlaps.max(axis=1)
        if covered.mean() > best_mean:
            best, best_mean = anchors, float(covered.mean())
        if assigned is not None and np.array_equal(nearest, assigned):
            break
        assigned = nearest
        members = [shapes[nearest == cluster] for cluster in range(len(anchors))]
        # A cluster without members restarts at the shape that is covered worst.
        worst = shapes[covered.argmin()]
        anchors = np.stack([np.median(each, axis=0) if len(each) else worst for each in members])
    return best, best_mean
