"""Slow, obviously right norms in NumPy float64. y: list of mini-batches (N, C, H, W)."""

from __future__ import annotations

import numpy as np


def _positions(y: np.ndarray) -> np.ndarray:
    """(N, C, H, W) -> (C, N * H * W)"""
    return y.transpose(1, 0, 2, 3).reshape(y.shape[1], -1)


def _from_positions(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    n, c, h, w = like.shape
    return rows.reshape(c, n, h, w).transpose(1, 0, 2, 3)


def cmbn_forward(batches, gamma, beta, eps):
    """Each mini-batch normalised by the plain mean and variance of all values of mini-batches 1..t."""
    outputs, seen = [], []
    for y in batches:
        seen.append(_positions(y))
        everything = np.concatenate(seen, axis=1)
        mean, var = everything.mean(1), everything.var(1)
        hat = (_positions(y) - mean[:, None]) / np.sqrt(var + eps)[:, None]
        outputs.append(_from_positions(gamma[:, None] * hat + beta[:, None], y))
    return outputs


def cmbn_share_backward(batches, gradients, gamma, eps):
    """dx, dgamma, dbeta per mini-batch; the earlier mini-batches are constants.

    Derivation, per channel, N values in all of which this mini-batch's are x_i:
    d mean/dx_i = 1/N, d var/dx_i = 2 (x_i - mean)/N, out_i = gamma (x_i - mean) r + beta.
    """
    results, seen = [], []
    for y, g in zip(batches, gradients, strict=True):
        x, g = _positions(y), _positions(g)
        seen.append(x)
        everything = np.concatenate(seen, axis=1)
        total = everything.shape[1]
        dx = np.zeros_like(x)
        dgamma, dbeta = np.zeros(len(x)), np.zeros(len(x))
        for c in range(len(x)):
            mean, var = everything[c].mean(), everything[c].var()
            r = 1 / np.sqrt(var + eps)
            d_mean = -(g[c] * gamma[c] * r).sum()
            d_var = (g[c] * gamma[c] * (x[c] - mean)).sum() * -0.5 * r**3
            for i in range(x.shape[1]):
                dx[c, i] = g[c, i] * gamma[c] * r + d_mean / total + d_var * 2 * (x[c, i] - mean) / total
            dgamma[c] = (g[c] * (x[c] - mean) * r).sum()
            dbeta[c] = g[c].sum()
        results.append((_from_positions(dx, y), dgamma, dbeta))
    return results


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


def cbn_std_moments(history, weight, *, groups):
    """Pooled mean and variance per channel at `weight` from (y, patches, old_weight) triples, newest last.

    Past means are exact; a past sigma is scaled by cov(y, P) . W / cov(y, P) . W_old. The newest mini-batch
    has its own moments.
    """
    filters = len(weight)
    counts, means, variances = [], [], []
    for age, (y, patches, old) in enumerate(reversed(history)):
        values = _positions(y)
        mean, var = np.zeros(filters), np.zeros(filters)
        for f in range(filters):
            p = patches[:, f // (filters // groups)].reshape(-1, patches.shape[-1])
            v = values[f]
            if age == 0:
                mean[f], var[f] = v.mean(), v.var()
                continue
            mean[f] = p.mean(0) @ weight[f].ravel()
            d = ((v - v.mean())[:, None] * (p - p.mean(0))).mean(0)
            ratio = max(0.0, (d @ weight[f].ravel()) / (d @ old[f].ravel()))
            var[f] = v.var() * ratio**2
        counts.append(values.shape[1])
        means.append(mean)
        variances.append(var)
    share = np.array(counts)[:, None] / sum(counts)
    mean = (share * means).sum(0)
    return mean, (share * (np.array(variances) + (np.array(means) - mean) ** 2)).sum(0)
