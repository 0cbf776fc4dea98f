"""Images that a data set holds more than once, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from itertools import combinations

from data.doctor.finding import Finding, findings_at
from data.image_set import ImageSet

_PIECE_BYTES = 4096

SHARED = ("image in both, byte for byte", "images in both, byte for byte")
REPEATED = ("image that repeats an earlier one, byte for byte", "images that repeat an earlier one, byte for byte")

_LEAK = "AP on {1} is too high: the images of {0} have shaped the weights or their choice. Remove them from one split."
_TWICE = (
    "They count twice, in training or in AP; where the labels of two differ, each calls the other's objects "
    "background. Keep one."
)


def same_bytes(image_sets: Sequence[ImageSet], digests: Sequence[Sequence[bytes]]) -> list[Finding]:
    """Find equal images. digests: of each image of each set; empty for an image without one."""
    findings = []
    for (first, keys), (second, others) in combinations(zip(image_sets, digests, strict=True), 2):
        known = _first_indices(keys)
        pairs = [(index, known[key]) for index, key in enumerate(others) if key in known]
        findings += _finding(SHARED, first, second, pairs, _LEAK)
    for image_set, keys in zip(image_sets, digests, strict=True):
        known = _first_indices(keys)
        pairs = [(index, known[key]) for index, key in enumerate(keys) if key and known[key] != index]
        findings += _finding(REPEATED, image_set, image_set, pairs, _TWICE)
    return findings


def quick_digests(image_set: ImageSet) -> list[bytes]:
    """Digest each image's size and three pieces of its bytes: images that share them are the same in practice."""
    return [_quick_digest(os.fsdecode(path)) for path in image_set.paths]


def _quick_digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = blake2b(size.to_bytes(8, "little"), digest_size=16)
            for start in sorted({0, max(0, size // 2), max(0, size - _PIECE_BYTES)}):
                file.seek(start)
                digest.update(file.read(_PIECE_BYTES))
            return digest.digest()
    except OSError:
        return b""


def _first_indices(keys: Sequence[bytes]) -> dict[bytes, int]:
    return {key: index for index, key in reversed(list(enumerate(keys))) if key}


def _finding(
    kind: tuple[str, str], first: ImageSet, second: ImageSet, pairs: list[tuple[int, int]], advice: str
) -> list[Finding]:
    """Make the finding of pairs: (index in `second`, index in `first`)."""
    places = [f"{second[index].path} = {first[earlier].path}" for index, earlier in pairs]
    where = " and ".join(dict.fromkeys([first.split, second.split]))
    return findings_at(places, kind, where, advice.format(first.split, second.split))
