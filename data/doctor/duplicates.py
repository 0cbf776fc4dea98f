"""Images that a data set holds more than once: by their bytes, or by their look."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import combinations

import numpy as np

from data.doctor.finding import Finding
from data.image_set import ImageSet

# Root mean square difference of two looks that count as one: grey levels, and share of the look's contrast. An image
# saved again as JPEG differs by 0.8 levels, one that was made smaller by mostly below 4; of BCCD's photographs two of
# one field by 2.9 (0.16 of the contrast) and all others by 10 (0.8), COCO's by 30, built-in digits by 6.
ALIKE_LEVELS = 4.0
ALIKE_SHARE = 0.25
_LEAST_CONTRAST = 4.0  # looks with less say nothing: a black image is like any other
_BLOCK = 128
_PIECE_BYTES = 4096

_LEAK = "AP on {1} will flatter: the images of {0} have shaped the weights or their choice. Remove them from one."
_REPEATED = (
    "They weigh double, in training or in AP; where the labels of two differ, each calls the other's objects "
    "background. Keep one."
)
_ALIKE = "One image saved twice, or scenes that hardly differ, as neighbouring frames of a film do. "

SHARED = ("image in both, byte for byte", "images in both, byte for byte")
ALIKE_IN_BOTH = ("image in both by its look", "images in both by their look")
REPEATED = ("image that is there before, byte for byte", "images that are there before, byte for byte")
ALIKE = ("image that is there before by its look", "images that are there before by their look")


def same_bytes(image_sets: Sequence[ImageSet], digests: Sequence[Sequence[bytes]]) -> list[Finding]:
    """digests: for each set, of each image; empty where there is none."""
    found = []
    for (first, keys), (second, others) in combinations(zip(image_sets, digests, strict=True), 2):
        known = _first_places(keys)
        pairs = [(index, known[key]) for index, key in enumerate(others) if key in known]
        found += _finding(SHARED, first, second, pairs, _LEAK)
    for image_set, keys in zip(image_sets, digests, strict=True):
        known = _first_places(keys)
        pairs = [(index, known[key]) for index, key in enumerate(keys) if key and known[key] != index]
        found += _finding(REPEATED, image_set, image_set, pairs, _REPEATED)
    return found


def same_look(
    image_sets: Sequence[ImageSet], digests: Sequence[Sequence[bytes]], looks: Sequence[np.ndarray]
) -> list[Finding]:
    """What `same_bytes` does not tell. looks: (N, P) uint8 of each set."""
    found = []
    splits = list(zip(image_sets, digests, looks, strict=True))
    for (first, keys, firsts), (second, others, seconds) in combinations(splits, 2):
        told = set(keys)
        pairs = [pair for pair in _pairs(nearest_look(seconds, firsts)) if others[pair[0]] not in told]
        found += _finding(ALIKE_IN_BOTH, first, second, pairs, _ALIKE + _LEAK)
    for image_set, keys, own in splits:
        pairs = [pair for pair in _pairs(nearest_look(own)) if keys[pair[0]] != keys[pair[1]]]
        found += _finding(ALIKE, image_set, image_set, pairs, _ALIKE + _REPEATED, is_note=True)
    return found


def nearest_look(looks: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """(N, P) uint8 -> (N,) the index of the one in `among` that is most alike, -1 where none is.

    among: (K, P); None: those of `looks` itself that come before.
    """
    before_only = among is None
    among = looks if among is None else among
    nearest = np.full(len(looks), -1)
    (rows, queries, means), (places, others, other_means) = _by_brightness(looks), _by_brightness(among)
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        # Two looks differ at least as much as their means.
        low = np.searchsorted(other_means, means[block][0] - ALIKE_LEVELS)
        high = np.searchsorted(other_means, means[block][-1] + ALIKE_LEVELS, side="right")
        if low == high:
            continue
        near = others[low:high]
        products = queries[block] @ near.T / looks.shape[1]
        squares = (queries[block] ** 2).mean(axis=1)[:, None] + (near**2).mean(axis=1) - 2 * products
        if before_only:
            squares[places[low:high] >= rows[block, None]] = np.inf
        best = squares.argmin(axis=1)
        limits = np.minimum(ALIKE_LEVELS, ALIKE_SHARE * queries[block].std(axis=1))
        is_alike = squares[np.arange(len(best)), best] <= limits**2
        nearest[rows[block][is_alike]] = places[low:high][best[is_alike]]
    return nearest


def quick_digests(image_set: ImageSet) -> list[bytes]:
    """Of each image's size and three pieces of its bytes: two images that share them are the same in practice."""
    return [_quick_digest(os.fsdecode(path)) for path in image_set.paths]


def path_digests(image_set: ImageSet) -> list[bytes]:
    return [bytes(path) for path in image_set.paths]


def _quick_digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = blake2b(size.to_bytes(8, "little"), digest_size=16)
            for place in sorted({0, max(0, size // 2), max(0, size - _PIECE_BYTES)}):
                file.seek(place)
                digest.update(file.read(_PIECE_BYTES))
            return digest.digest()
    except OSError:
        return b""


def _first_places(keys: Sequence[bytes]) -> dict[bytes, int]:
    return {key: index for index, key in reversed(list(enumerate(keys))) if key}


def _by_brightness(looks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Those with contrast, ascending by mean: (K,) their indices, (K, P) float32 around 0, (K,) their means."""
    rows = np.flatnonzero(looks.std(axis=1, dtype=np.float32) >= _LEAST_CONTRAST)
    centred = looks[rows].astype(np.float32) - 128
    means = centred.mean(axis=1)
    order = np.argsort(means, kind="stable")
    return rows[order], centred[order], means[order]


def _pairs(nearest: np.ndarray) -> Iterator[tuple[int, int]]:
    return ((int(index), int(nearest[index])) for index in np.flatnonzero(nearest >= 0))


def _finding(
    kind: tuple[str, str],
    first: ImageSet,
    second: ImageSet,
    pairs: list[tuple[int, int]],
    advice: str,
    is_note: bool = False,
) -> list[Finding]:
    """pairs: (index in `second`, in `first`)."""
    if not pairs:
        return []
    splits = list(dict.fromkeys([first.split, second.split]))
    sign = "~" if kind in (ALIKE_IN_BOTH, ALIKE) else "="
    places = tuple(f"{second[index].path} {sign} {first[twin].path}" for index, twin in pairs)
    advice = advice.format(first.split, second.split)
    where = " and ".join(splits)
    return [Finding(kind=kind, where=where, count=len(pairs), advice=advice, places=places, is_note=is_note)]
