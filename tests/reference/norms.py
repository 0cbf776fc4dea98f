"""Slow, obviously right norms in NumPy float64. y (N, C, H, W): a mini-batch, as the convolution made it."""

from __future__ import annotations

import numpy as np


def rows_of(y: np.ndarray) -> np.ndarray:
    """(N, C, H, W) -> (C, N * H * W): all values of a channel."""
    return y.transpose(1, 0, 2, 3).reshape(y.shape[1], -1)


def from_rows(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    n, c, h, w = like.shape
    return rows.reshape(c, n, h, w).transpose(1, 0, 2, 3)


def normalized(y, mean, var, gamma, beta, eps):
    """gamma * (y - mean) / sqrt(var + eps) + beta; everything but y is (C,)."""
    out = np.empty_like(y)
    for c in range(y.shape[1]):
        out[:, c] = gamma[c] * (y[:, c] - mean[c]) / np.sqrt(var[c] + eps) + beta[c]
    return out


def affine_gradients(y, g, mean, var, eps):
    """dgamma and dbeta (C,) of `normalized`."""
    x, g = rows_of(y), rows_of(g)
    hat = (x - mean[:, None]) / np.sqrt(var + eps)[:, None]
    return (g * hat).sum(1), g.sum(1)


# --- batch norm ----------------------------------------------------------------------------------------------


def bn_forward(y, gamma, beta, eps):
    rows = rows_of(y)
    return normalized(y, rows.mean(1), rows.var(1), gamma, beta, eps)


def bn_backward(y, g, gamma, eps):
    """dx, dgamma, dbeta by the whole Jacobian: d hat_i / d x_j = r (delta_ij - 1/N - hat_i hat_j / N)."""
    x, rows_g = rows_of(y), rows_of(g)
    dx, size = np.zeros_like(x), x.shape[1]
    for c in range(len(x)):
        r = 1 / np.sqrt(x[c].var() + eps)
        hat = (x[c] - x[c].mean()) * r
        jacobian = r * (np.eye(size) - 1 / size - np.outer(hat, hat) / size)
        dx[c] = jacobian.T @ (gamma[c] * rows_g[c])
    return from_rows(dx, y), *affine_gradients(y, g, x.mean(1), x.var(1), eps)


def running_by_batch(batches, momentum):
    """Running mean and variance after `batches`, each a list of mini-batches that count as one population.

    Averages of first and second moments, all batches alike until there are 1 / momentum of them. The variance of
    a batch has N - 1 in the divisor.
    """
    mean = square = None
    for number, parts in enumerate(batches, start=1):
        rows = np.concatenate([rows_of(y) for y in parts], axis=1)
        m, s = rows.mean(1), rows.var(1, ddof=1) + rows.mean(1) ** 2
        rate = max(momentum, 1 / number)
        mean = m if mean is None else (1 - rate) * mean + rate * m
        square = s if square is None else (1 - rate) * square + rate * s
    return mean, square - mean**2


def running_from_start(batches, momentum):
    """As `running_by_batch`, but exponential averages from mean 0 and variance 1 on."""
    channels = batches[0][0].shape[1]
    mean, square = np.zeros(channels), np.ones(channels)
    for parts in batches:
        rows = np.concatenate([rows_of(y) for y in parts], axis=1)
        mean = (1 - momentum) * mean + momentum * rows.mean(1)
        square = (1 - momentum) * square + momentum * (rows.var(1, ddof=1) + rows.mean(1) ** 2)
    return mean, square - mean**2


# --- moments of which the mini-batch is a part ---------------------------------------------------------------


def share_backward(y, g, gamma, mean, var, total, eps):
    """dx, dgamma, dbeta where this mini-batch's values x_i are among the `total` (C,) that have mean and var.

    Derivation, per channel: d mean/dx_i = 1/total, d var/dx_i = 2 (x_i - mean)/total, and
    out_i = gamma (x_i - mean) / sqrt(var + eps) + beta.
    """
    x, rows_g = rows_of(y), rows_of(g)
    dx = np.zeros_like(x)
    for c in range(len(x)):
        r = 1 / np.sqrt(var[c] + eps)
        d_mean = -(rows_g[c] * gamma[c] * r).sum()
        d_var = (rows_g[c] * gamma[c] * (x[c] - mean[c])).sum() * -0.5 * r**3
        for i in range(x.shape[1]):
            through_moments = d_mean / total[c] + d_var * 2 * (x[c, i] - mean[c]) / total[c]
            dx[c, i] = rows_g[c, i] * gamma[c] * r + through_moments
    return from_rows(dx, y), *affine_gradients(y, g, mean, var, eps)


def renorm_backward(y, g, gamma, mean, var, eps):
    """Values by mean and var, but to x the gradient of batch norm, times own sigma / sigma (Ioffe 2017)."""
    ratio = np.sqrt(rows_of(y).var(1) + eps) / np.sqrt(var + eps)
    dx, _, _ = bn_backward(y, g, gamma * ratio, eps)
    return dx, *affine_gradients(y, g, mean, var, eps)


def cmbn_moments(batches):
    """Per mini-batch t the plain mean, variance and number of all values of mini-batches 1..t."""
    moments, seen = [], []
    for y in batches:
        seen.append(rows_of(y))
        everything = np.concatenate(seen, axis=1)
        moments.append((everything.mean(1), everything.var(1), np.full(len(everything), everything.shape[1])))
    return moments


def darknet_cmbn(batches, gradients, gamma, beta, *, eps, momentum, rolling_mean, rolling_var):
    """`batch_normalize=2` of darknet: per mini-batch (out, dx, dgamma, dbeta, rolling mean, rolling variance)."""
    results, mean_avg, square_avg = [], 0.0, 0.0
    for k, (y, g) in enumerate(zip(batches, gradients, strict=True), start=1):
        x, rows_g = rows_of(y), rows_of(g)
        size = x.shape[1]
        mu = x.mean(1)
        q = np.maximum((x**2).sum(1) / (size - 1), mu**2)
        mean_avg = mu / k + (1 - 1 / k) * mean_avg
        square_avg = q / k + (1 - 1 / k) * square_avg
        var = np.maximum(0, square_avg - mean_avg**2)
        rolling_mean = momentum * mean_avg + (1 - momentum) * rolling_mean
        rolling_var = momentum * var + (1 - momentum) * rolling_var
        r = 1 / np.sqrt(var + eps)
        hat = (x - mean_avg[:, None]) * r[:, None]
        dgamma, dbeta = affine_gradients(y, g, mean_avg, var, eps)
        dx = (gamma * r / size)[:, None] * (size * rows_g - dbeta[:, None] - hat * dgamma[:, None])
        out = normalized(y, mean_avg, var, gamma, beta, eps)
        results.append((out, from_rows(dx, y), dgamma, dbeta, rolling_mean, rolling_var))
    return results


# --- batch renormalization -----------------------------------------------------------------------------------


def brn_limits(step, *, r_max, d_max, burn_in_steps, ramp_steps):
    """(r_max, d_max) at a step: 1 and 0 in burn-in, then opening linearly, fully open `ramp_steps` later."""
    if step < burn_in_steps:
        return 1.0, 0.0
    opened = min(1.0, (step - burn_in_steps + 1) / ramp_steps)
    return 1 + opened * (r_max - 1), opened * d_max


def brn(y, g, gamma, beta, running_mean, running_var, r_max, d_max, eps):
    """out, dx, dgamma, dbeta (Ioffe 2017, algorithm 1): r and d are constants of the gradient."""
    x = rows_of(y)
    sigma_own, sigma = np.sqrt(x.var(1) + eps), np.sqrt(running_var + eps)
    r = np.clip(sigma_own / sigma, 1 / r_max, r_max)
    d = np.clip((x.mean(1) - running_mean) / sigma, -d_max, d_max)
    hat = (x - x.mean(1)[:, None]) / sigma_own[:, None] * r[:, None] + d[:, None]
    out = gamma[:, None] * hat + beta[:, None]
    dx, _, _ = bn_backward(y, g, gamma * r, eps)
    rows_g = rows_of(g)
    return from_rows(out, y), dx, (rows_g * hat).sum(1), rows_g.sum(1)


# --- group norm ----------------------------------------------------------------------------------------------


def gn(y, g, gamma, beta, groups, eps):
    """out, dx, dgamma, dbeta: each image's group of channels is one population (Wu & He 2018)."""
    out, dx = np.zeros_like(y), np.zeros_like(y)
    dgamma, dbeta = np.zeros(y.shape[1]), g.sum((0, 2, 3))
    width = y.shape[1] // groups
    for n in range(len(y)):
        for group in range(groups):
            at = slice(group * width, (group + 1) * width)
            x = y[n, at].ravel()
            r = 1 / np.sqrt(x.var() + eps)
            hat = (x - x.mean()) * r
            jacobian = r * (np.eye(x.size) - 1 / x.size - np.outer(hat, hat) / x.size)
            out[n, at] = gamma[at, None, None] * hat.reshape(y[n, at].shape) + beta[at, None, None]
            dx[n, at] = (jacobian.T @ (gamma[at, None, None] * g[n, at]).ravel()).reshape(y[n, at].shape)
            dgamma[at] += (g[n, at] * hat.reshape(y[n, at].shape)).sum((1, 2))
    return out, dx, dgamma, dbeta


# --- norms of single images with an activation of their own ----------------------------------------------------


def evonorm_s0(y, gamma, beta, v, groups, eps):
    """y sigmoid(v y) / sqrt(variance of the image's group + eps) gamma + beta (Liu et al. 2020, table 2).

    v None: y in place of y sigmoid(v y).
    """
    out, width = np.empty_like(y), y.shape[1] // groups
    for n in range(len(y)):
        for c in range(y.shape[1]):
            start = c // width * width
            deviation = np.sqrt(y[n, start : start + width].var() + eps)
            numerator = y[n, c] if v is None else y[n, c] / (1 + np.exp(-v[c] * y[n, c]))
            out[n, c] = numerator / deviation * gamma[c] + beta[c]
    return out


def frn(y, gamma, beta, tau, eps):
    """max(gamma y / sqrt(nu^2 + eps) + beta, tau), nu^2 the mean of y^2 over positions (Singh & Krishnan 2020).

    tau None: no maximum.
    """
    out = np.empty_like(y)
    for n in range(len(y)):
        for c in range(y.shape[1]):
            out[n, c] = gamma[c] * y[n, c] / np.sqrt((y[n, c] ** 2).mean() + eps) + beta[c]
            if tau is not None:
                out[n, c] = np.maximum(out[n, c], tau[c])
    return out


# --- filters ---------------------------------------------------------------------------------------------------


def standardized(weight, eps):
    """Each filter minus its mean, by sqrt(mean of squares - mean^2 + eps) (Qiao et al. 2019, section 3)."""
    out = np.empty_like(weight)
    for i, row in enumerate(weight):
        out[i] = (row - row.mean()) / np.sqrt((row**2).mean() - row.mean() ** 2 + eps)
    return out


# --- MABN ----------------------------------------------------------------------------------------------------


def image_average(values, images, average_images):
    """(C,) average of `values`, one per mini-batch of so many `images`, oldest first.

    Every image has its mini-batch's value, and one seen k images later weighs (1 - 1 / average_images)^k more.
    """
    of_images = [value for value, count in zip(values, images, strict=True) for _ in range(count)]
    weights = (1 - 1 / average_images) ** np.arange(len(of_images) - 1, -1, -1.0)
    return (weights[:, None] * np.array(of_images)).sum(0) / weights.sum()


def mabn(batches, gradients, gamma, beta, average_images, eps):
    """(out, dx, dgamma, dbeta) of each mini-batch; the backward of one comes before the forward of the next."""
    results, squares, products, images = [], [], [], []
    for y, g in zip(batches, gradients, strict=True):
        x, rows_g = rows_of(y), rows_of(g)
        images.append(len(y))
        squares.append((x**2).mean(1))
        r = 1 / np.sqrt(image_average(squares, images, average_images) + eps)
        hat = x * r[:, None]
        products.append((gamma[:, None] * rows_g * hat).mean(1))
        q = image_average(products, images, average_images)
        dx = (gamma[:, None] * rows_g - hat * q[:, None]) * r[:, None]
        out = gamma[:, None] * hat + beta[:, None]
        results.append((from_rows(out, y), from_rows(dx, y), (rows_g * hat).sum(1), rows_g.sum(1)))
    return results
