"""How far AP can be trusted: images are drawn again with replacement, many times (Efron 1979), and AP is computed anew.

What this shows is chance in the choice of images. That of a training's seed comes on top (`study/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.matches import Matches

Interval = tuple[float, float]

_LEVEL = 0.95
_MOST, _FEWEST = 1000, 100  # draws
_WORK = 500_000_000  # detections x draws, some seconds: of larger sets there are fewer draws, down to _FEWEST
_PART = 250  # draws at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """An AP less another on the same images, in -1..1, and its 95 % interval.

    p: two-sided: twice the share of draws in which it has the other sign or is 0; 1 at most. Of few images draws show
    too little chance, so it is no less than the sign test's if all n images agree, 2 / 2^n.
    """

    value: float
    interval: Interval
    p: float

    @property
    def is_shown(self) -> bool:
        """Whether it is larger than chance in the choice of images explains."""
        low, high = self.interval
        return self.p <= 1 - _LEVEL and (low > 0 or high < 0)


def drawn_AP(*models: Matches) -> list[np.ndarray]:
    """Compute AP by class on draws of as many images as there are, the same draws for all models, with a fixed seed.

    Returns for each model (N, C), NaN for a class without objects in the draw.
    """
    parts = [[each.class_AP(counts) for each in models] for counts in _draws(models[0].images, _count(models))]
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def interval(value: float, drawn: np.ndarray) -> Interval | None:
    """Return the 95 % interval of a value from the same value on draws, (N,); None if no draw has one, which NaN says.

    The percentiles are moved so that the median is `value`. On repeated images AP is higher, by 0.02 with few objects
    of many classes: percentiles alone may lie above the AP that they belong to.
    """
    known = drawn[~np.isnan(drawn)]
    if not known.size:
        return None
    low, middle, high = np.quantile(known, [(1 - _LEVEL) / 2, 0.5, (1 + _LEVEL) / 2])
    return float(value + low - middle), float(value + high - middle)


def difference(
    one: float, other: float, drawn_one: np.ndarray, drawn_other: np.ndarray, *, images: int
) -> Difference | None:
    """Return `other` less `one`, from their values on the same draws, (N,); None where an interval is None.

    images: how many have objects.
    """
    value, drawn = other - one, drawn_other - drawn_one
    if (ends := interval(value, drawn)) is None:
        return None
    known = drawn[~np.isnan(drawn)]
    moved = known + (value - np.median(known))
    fewer = min((moved <= 0).sum(), (moved >= 0).sum())
    p = max(2 * float(fewer + 1) / (len(known) + 1), 2.0 ** (1 - images))
    return Difference(value=value, interval=ends, p=min(1.0, p))


def _count(models: Sequence[Matches]) -> int:
    work = max(each.detections for each in models)
    return int(np.clip(_WORK // max(work, 1), _FEWEST, _MOST))


def _draws(images: int, count: int) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn, (I, n) int64, for `count` draws in parts."""
    random = np.random.default_rng(0)
    for first in range(0, count, _PART):
        draws = random.integers(max(images, 1), size=(min(_PART, count - first), images))
        yield np.stack([np.bincount(draw, minlength=images) for draw in draws], axis=1)
