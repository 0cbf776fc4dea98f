"""Class-balanced sampling: images with rare classes are seen more often.

Source: repeat-factor sampling, Gupta et al. 2019, LVIS (arXiv:1908.03195): an image repeats by the largest sqrt(t / f)
of its classes, f being the share of images with the class. Here t is the f of the most frequent class, and an epoch
keeps its length.
"""

from __future__ import annotations

import numpy as np

from data.image_set import ImageSet


def image_shares(image_set: ImageSet) -> np.ndarray:
    """Return (N,) the share of each image in an epoch; they add up to 1. Images without objects count as frequent."""
    images, labels = _images_and_classes(image_set)
    factors = np.ones(len(image_set))
    if len(labels):
        counts = np.bincount(labels)
        np.maximum.at(factors, images, np.sqrt(counts.max() / counts[labels]))
    return factors / factors.sum()


def balanced_order(shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw (N,) images for an epoch, in random order: of each its share of N, rounded up or down at random.

    Systematic sampling keeps the total: N equidistant marks, at a random offset, over the images laid end to end.
    """
    images = rng.permutation(len(shares))
    marks = (np.arange(len(shares)) + rng.random()) / len(shares)
    return rng.permutation(images[images_at(marks, np.cumsum(shares[images]))])


def images_at(marks: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return which images lie at marks from 0 to 1, if they are laid end to end; ends: (N,) cumulated shares."""
    return np.minimum(np.searchsorted(ends, marks * ends[-1], side="right"), len(ends) - 1)


def balance_in_words(image_set: ImageSet, shares: np.ndarray) -> str:
    """Return what the shares do to the rarest class: "owl, the rarest class, is in 12.0 % of the images, not 4.0 %"."""
    images, labels = _images_and_classes(image_set)
    if not len(labels):
        return "no image shows an object: all are as frequent as without"
    counts = np.bincount(labels)
    rarest = int(np.flatnonzero(counts == counts[counts > 0].min())[0])
    now, before = 100 * shares[images[labels == rarest]].sum(), 100 * counts[rarest] / len(image_set)
    name = image_set.class_names[rarest]
    return f"{name}, the rarest class, is in {now:.1f} % of an epoch's images instead of {before:.1f} %"


def _images_and_classes(image_set: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of an image and a class that it shows, each once, without crowd regions."""
    is_object, classes = ~image_set.is_crowd, len(image_set.class_names)
    pairs = np.unique(image_set.owners[is_object] * classes + image_set.labels[is_object])
    return pairs // classes, pairs % classes
