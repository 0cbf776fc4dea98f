"""CBN's window in NumPy float64: past mini-batches brought to today's weights, one filter at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.reference.norms import rows_of


@dataclass(frozen=True)
class Seen:
    """A mini-batch of the past: output (N, F, H, W), patches (N, G, H, W, K), the weights and step it was made at."""

    y: np.ndarray
    patches: np.ndarray
    weight: np.ndarray
    step: int = 0

    def of_filter(self, f: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """values (positions,), patches (positions, K), old filter (K,)"""
        group = f // (len(self.weight) // self.patches.shape[1])
        return rows_of(self.y)[f], self.patches[:, group].reshape(-1, self.patches.shape[-1]), self.weight[f].ravel()


def conv(x, weight, *, stride, padding, groups):
    """Cross-correlation by loops over output positions. x (N, C, H, W), weight (F, C/groups, k, k).

    Returns y (N, F, H', W') and the patches (N, groups, H', W', K).
    """
    k = weight.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    height = (padded.shape[2] - k) // stride + 1
    width = (padded.shape[3] - k) // stride + 1
    per_group = x.shape[1] // groups
    patches = np.zeros((len(x), groups, height, width, per_group * k * k))
    y = np.zeros((len(x), len(weight), height, width))
    for n in range(len(x)):
        for row in range(height):
            for column in range(width):
                window = padded[n, :, row * stride : row * stride + k, column * stride : column * stride + k]
                for group in range(groups):
                    patches[n, group, row, column] = window[group * per_group : (group + 1) * per_group].ravel()
                for f in range(len(weight)):
                    group = f // (len(weight) // groups)
                    y[n, f, row, column] = patches[n, group, row, column] @ weight[f].ravel()
    return y, patches


def covariance(values: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """(K,)"""
    return ((values - values.mean())[:, None] * (patches - patches.mean(0))).mean(0)


def std(seen: Seen, f: int, w: np.ndarray) -> tuple[float, float]:
    """Mean and variance at today's filter: the mean is exact, sigma scales with cov(y, P) . W."""
    v, p, old = seen.of_filter(f)
    d = covariance(v, p)
    return p.mean(0) @ w, v.var() * max(0.0, (d @ w) / (d @ old)) ** 2


def taylor(seen: Seen, f: int, w: np.ndarray) -> tuple[float, float]:
    """First-order steps of E[y] and E[y^2], whose gradients to the filter are E[P] and 2 E[y P]."""
    v, p, old = seen.of_filter(f)
    mean = v.mean() + p.mean(0) @ (w - old)
    square = (v**2).mean() + 2 * (v[:, None] * p).mean(0) @ (w - old)
    return mean, square - mean**2


def none(seen: Seen, f: int, w: np.ndarray) -> tuple[float, float]:
    v, _, _ = seen.of_filter(f)
    return v.mean(), v.var()


ESTIMATORS = {"std": std, "taylor": taylor, "none": none}


def pooled(populations: list[tuple[int, float, float]]) -> tuple[float, float, int]:
    """(count, mean, var) of each -> mean, var, count of the union, by first and second moments."""
    total = sum(count for count, _, _ in populations)
    mean = sum(count * m for count, m, _ in populations) / total
    square = sum(count * (v + m**2) for count, m, v in populations) / total
    return mean, square - mean**2, total


def moments(history: list[Seen], estimator: str):
    """Pooled mean, variance and count (F,) at the newest weights; `history` has the newest mini-batch last.

    A past mini-batch whose variance comes out negative is left out of its channel, as in the authors' code. The
    newest has its own moments.
    """
    now = history[-1]
    columns = []
    for f in range(len(now.weight)):
        populations = []
        for seen in history:
            v, _, _ = seen.of_filter(f)
            mean, var = (v.mean(), v.var()) if seen is now else ESTIMATORS[estimator](seen, f, now.weight[f].ravel())
            if var >= 0:
                populations.append((v.size, mean, var))
        columns.append(pooled(populations))
    mean, var, count = (np.array(column) for column in zip(*columns, strict=True))
    return mean, var, count


def lite_moments(history: list[Seen], weights: list[np.ndarray], shared: list[list[np.ndarray]]):
    """As `moments`, for CBN-lite: sigma is chained from step to step with the covariance of the day.

    weights: of step s, (F, ...). shared: of step s, per filter the cov(y, P) last measured at or before s.
    sigma_i(today) = sigma_i * product over s = step of i .. yesterday of (D_s . W_s+1) / (D_s . W_s).
    """
    now = history[-1]
    columns = []
    for f in range(len(now.weight)):
        populations = []
        for seen in history:
            v, p, _ = seen.of_filter(f)
            sigma, mean = v.std(), p.mean(0) @ now.weight[f].ravel()
            for s in range(seen.step, now.step):
                d = shared[s][f]
                sigma *= max(0.0, (d @ weights[s + 1][f].ravel()) / (d @ weights[s][f].ravel()))
            populations.append((v.size, mean, sigma**2))
        columns.append(pooled(populations))
    mean, var, count = (np.array(column) for column in zip(*columns, strict=True))
    return mean, var, count
