"""One scene of the digits data set: a textured background, digits in contrasting ink, and lighting."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

_SIZE_PX = (14.0, 52.0)
_MIDDLE_PX = math.sqrt(_SIZE_PX[0] * _SIZE_PX[1])
_MOST_DIGITS = 8
_TRIES = 30
_OVERLAP = 0.1
_INK_VISIBLE = 0.35  # a pixel of at least this opacity counts as ink for the box


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Image (H, W, 3) uint8 RGB; boxes (M, 4) float32 xyxy in px, tight around the ink; labels (M,)."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def draw_scene(
    rng: np.random.Generator, inks: np.ndarray, labels: np.ndarray, *, hw: tuple[int, int], shift: float
) -> Scene:
    """Draw a scene. inks: (K, 8, 8) float32 in 0..1, the digits to choose from, and labels (K,). M is 1 to 8.

    shift: 0..1. At 0 all scenes have the same statistics of brightness, contrast and digit size; at 1 they differ far
    more between scenes than within one.
    """
    canvas = _background(rng, hw)
    middle_px = _MIDDLE_PX * (_SIZE_PX[1] / _MIDDLE_PX) ** (0.85 * shift * rng.uniform(-1, 1))
    boxes = np.empty((0, 4), np.float32)
    chosen: list[int] = []
    count = int(rng.integers(1, _MOST_DIGITS + 1))
    for _ in range(_TRIES):
        if len(chosen) == count:
            break
        index = int(rng.integers(len(inks)))
        size_px = float(np.clip(middle_px * rng.uniform(0.8, 1.25), *_SIZE_PX))
        alpha = _stroke(rng, inks[index], min(size_px, 0.8 * min(hw)))
        top = int(rng.integers(hw[0] - alpha.shape[0] + 1))
        left = int(rng.integers(hw[1] - alpha.shape[1] + 1))
        box = np.array([left, top, left + alpha.shape[1], top + alpha.shape[0]], np.float32)
        if (_covered(box, boxes) <= _OVERLAP).all():
            _write(rng, canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]], alpha)
            boxes = np.concatenate([boxes, box[None]])
            chosen.append(index)
    return Scene(image=_lit(rng, canvas, shift), boxes=boxes, labels=labels[chosen].astype(np.int64))


def _background(rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    """Draw (H, W, 3) float32 in 0..1: a colour, a gradient, noise of several octaves, half of the time stripes."""
    height, width = hw
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(hw)
    texture = np.zeros(hw, np.float32)
    for cells in (3, 6, 12, 24, 48):
        noise = rng.standard_normal((cells, cells)).astype(np.float32)
        weight = rng.uniform(0.3, 1) * cells**-0.35
        texture += weight * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.5:
        angle, waves = rng.uniform(0, math.pi), rng.uniform(3, 16)
        along = math.cos(angle) * x + math.sin(angle) * y
        texture += rng.uniform(0.3, 1) * np.sin(2 * math.pi * waves * along + rng.uniform(0, 6.3))
    texture *= rng.uniform(0.03, 0.07) / texture.std()
    slope = rng.uniform(-0.15, 0.15, size=2)
    texture += slope[0] * (x - x.mean()) + slope[1] * (y - y.mean())
    tint = cv2.resize(rng.uniform(-0.08, 0.08, (2, 2, 3)).astype(np.float32), (width, height))
    return texture[..., None] + tint + np.float32(rng.uniform(0.35, 0.65))


def _stroke(rng: np.random.Generator, ink: np.ndarray, size_px: float) -> np.ndarray:
    """(8, 8) ink -> its opacity at size_px, slightly stretched and rotated, cropped to the visible ink."""
    angle_deg, aspect = rng.uniform(-12, 12), rng.uniform(0.85, 1.2)
    side = math.ceil(1.6 * size_px)
    matrix = np.asarray(cv2.getRotationMatrix2D((3.5, 3.5), angle_deg, size_px / 8), np.float64)
    matrix[0] *= aspect
    matrix[:, 2] += (side - 1) / 2 - np.array([3.5 * aspect, 3.5])
    smooth = cv2.warpAffine(ink, matrix, (side, side), flags=cv2.INTER_CUBIC)
    alpha = ((smooth - 0.2) / 0.4).clip(0, 1)
    rows = np.flatnonzero((alpha > _INK_VISIBLE).any(axis=1))
    columns = np.flatnonzero((alpha > _INK_VISIBLE).any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _covered(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return (M,) intersection over the smaller area: a small digit within a large one is fully covered."""
    overlap = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    return overlap.clip(0).prod(axis=1) / np.minimum(areas, (box[2:] - box[:2]).prod())


def _write(rng: np.random.Generator, patch: np.ndarray, alpha: np.ndarray) -> None:
    """Blend ink into the patch, in place: lighter or darker than the background there, randomly tinted."""
    background = float(patch.mean())
    lighter = rng.random() < 1 - background  # a light background gets dark ink more often
    tint = rng.uniform(-0.2, 0.2, size=3)
    colour = background + (1 if lighter else -1) * rng.uniform(0.35, 0.5) + tint - tint.mean()
    patch += alpha[..., None] * (colour.astype(np.float32) - patch)


def _lit(rng: np.random.Generator, canvas: np.ndarray, shift: float) -> np.ndarray:
    """Apply contrast, brightness, colour cast and sensor noise -> uint8; low contrast allows more brightness."""
    contrast = math.exp(shift * rng.uniform(math.log(0.35), math.log(1.2)))
    room = max(0.5 - 0.42 * contrast, 0.05)
    cast = shift * rng.uniform(-0.05, 0.05, size=3)
    level = 0.5 + shift * room * rng.uniform(-1, 1) + cast
    lit = (canvas - 0.5) * np.float32(contrast) + level.astype(np.float32)
    lit += 0.012 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (255 * lit).clip(0, 255).round().astype(np.uint8)
