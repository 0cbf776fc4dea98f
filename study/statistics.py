"""Statistics of few paired seeds: intervals, paired differences, exact permutation p-values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_RESAMPLES = 20_000
_EXACT_UP_TO = 16  # pairs: 2^16 sign patterns
# 97.5 % quantiles of Student's t with 1 .. 10 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value with its 95 % interval; NaN for a single seed."""

    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain(Estimate):
    """A paired difference. p: one-sided, that it is larger than 0; the smallest possible is 2^-seeds."""

    p: float

    @property
    def is_significant(self) -> bool:
        return self.low > 0 and self.p <= 0.05


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one value per seed."""
    columns = np.asarray(values, float)[:, None]
    return _bootstrapped(columns, lambda means: means[..., 0])


def gain(values: Mapping[int, float], reference: Mapping[int, float]) -> Gain | None:
    """Return the difference paired by seed; None without a common seed."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    differences = np.array([values[seed] - reference[seed] for seed in seeds])
    found = estimate(differences.tolist())
    return Gain(value=found.value, low=found.low, high=found.high, seeds=len(seeds), p=sign_flip_p(differences))


def won_back(values: Mapping[int, float], small: Mapping[int, float], large: Mapping[int, float]) -> Estimate | None:
    """Return the share of the gap between the reference at a small mini-batch and at 16, a ratio of mean differences.

    None if the gap's own interval includes 0: a share of nothing is noise.
    """
    gap = gain(large, small)
    seeds = sorted(values.keys() & small.keys() & large.keys())
    if gap is None or not gap.low > 0 or not seeds:
        return None
    columns = np.array([(values[seed] - small[seed], large[seed] - small[seed]) for seed in seeds])
    return _bootstrapped(columns, lambda means: means[..., 0] / means[..., 1])


def sign_flip_p(differences: np.ndarray) -> float:
    """Return the probability of a mean difference at least this large if each sign were random (Fisher 1935).

    Over all 2^n sign patterns, so that p is at least 1/32 = .031 with 5 seeds; beyond 16 seeds over a random sample.
    """
    n = len(differences)
    if n <= _EXACT_UP_TO:
        signs = np.array(list(itertools.product((1, -1), repeat=n)))
        means = signs @ differences / n
        return float((means >= differences.mean() - 1e-12).mean())
    signs = np.random.default_rng(0).choice((1, -1), (_RESAMPLES, n))
    hits = (signs @ differences / n >= differences.mean() - 1e-12).sum()
    return float((hits + 1) / (_RESAMPLES + 1))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return which tests of a family are significant together at `level` (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    held = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        held[index] = True
    return held


def _bootstrapped(columns: np.ndarray, of_means: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """Return the expanded percentile interval (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", 5.3).

    With n seeds the plain interval is too narrow by sqrt((n - 1) / n) and by the normal's quantile in place of
    Student's. Up to three seeds it becomes the range of what resampling can give.
    columns: (n, k), k paired values for each of n seeds. of_means: (..., k) means -> (...) values.
    """
    n = len(columns)
    value = float(of_means(columns.mean(0)))
    if n < 2:
        return Estimate(value=value, low=float("nan"), high=float("nan"), seeds=n)
    drawn = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    found = of_means(columns[drawn].mean(1))
    t = _T[n - 2] if n - 2 < len(_T) else 1.96 + 2.5 / (n - 1)
    tail = NormalDist().cdf(-t * (n / (n - 1)) ** 0.5)
    low, high = np.quantile(found, [tail, 1 - tail])
    return Estimate(value=value, low=float(low), high=float(high), seeds=n)
