"""Reading, decoding and digesting every image of a split."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import TextIO

import cv2
import numpy as np
from tqdm import tqdm

from data.doctor.finding import Finding, findings_at
from data.doctor.labels import OTHER_SIZE_ADVICE, SWAPPED_ADVICE
from data.image_set import ImageSet
from data.problems import OTHER_SIZE, SWAPPED_SIZE, other_size
from utils.image_file import content_of, decode, image_hw, is_transposed, lies_on_its_side

UNREADABLE = ("image that does not open", "images that do not open")
DARK = ("image of 16 bits that is nearly black in 8", "images of 16 bits that are nearly black in 8")

_ADVICE = {
    UNREADABLE: "Cut off or damaged: training takes another image or shows grey from there on, and evaluation counts "
    "the objects there as missed. Restore or remove it.",
    DARK: "Of 16 bits the upper 8 are read, so that values up to 4095 become 0 to 15 of 255: next to nothing is "
    "visible. Rescale the values to 0 to 255, and save 8 bits.",
    SWAPPED_SIZE: SWAPPED_ADVICE,
    OTHER_SIZE: OTHER_SIZE_ADVICE,
}
_DARK_LEVELS = 32  # of 256; an image without a brighter pixel is dark
_CHUNK = 32  # images a thread takes at a time
# JPEG markers that a length field follows, and the end, D9: no stuffed FF, no restart within a scan, no start.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """What decoding N images showed.

    digests: of all bytes of each, empty where there is no file. opens: (N,) bool. hws: (N, 2), as read, 0 if unknown.
    dark: (N,) bool, images of 16 bits that are nearly black as read.
    """

    digests: list[bytes]
    opens: np.ndarray
    hws: np.ndarray
    dark: np.ndarray


def scan_images(image_set: ImageSet, threads: int) -> Scan:
    """Decode all images, with a progress bar: each file is read once, a JPEG decoded at an eighth of its size."""
    count = len(image_set)
    digests = [b""] * count
    opens, dark, hws = np.zeros(count, bool), np.zeros(count, bool), np.zeros((count, 2), np.int32)

    def scan(first: int) -> int:
        last = min(first + _CHUNK, count)
        for index in range(first, last):
            path = os.fsdecode(image_set.paths[index])
            digests[index], opens[index], dark[index] = _decoded(path)
            if opens[index]:
                hws[index] = _hw_as_read(path, _pair(image_set.hws[index]))
        return last - first

    with _silent_decoders() as stderr, ThreadPoolExecutor(threads) as pool:
        # In a file or a pipe, one line every half minute is enough.
        interval_s = 0.2 if sys.stderr.isatty() else 30
        bar = tqdm(
            total=count,
            desc=f"reading {image_set.split}",
            unit="image",
            file=stderr,
            leave=False,
            mininterval=interval_s,
            maxinterval=max(10, interval_s),
        )
        with bar:
            for done in pool.map(scan, range(0, count, _CHUNK)):
                bar.update(done)
    return Scan(digests=digests, opens=opens, hws=hws, dark=dark)


def image_findings(image_set: ImageSet, scan: Scan) -> list[Finding]:
    paths = [os.fsdecode(path) for path in image_set.paths]
    places_of: dict[tuple[str, str], list[str]] = {
        UNREADABLE: [paths[index] for index in np.flatnonzero(~scan.opens)],
        DARK: [paths[index] for index in np.flatnonzero(scan.dark)],
        SWAPPED_SIZE: [],
        OTHER_SIZE: [],
    }
    differs = (scan.hws != image_set.hws).any(axis=1) & (scan.hws > 0).all(axis=1)
    for index in np.flatnonzero(differs):
        hw, annotated_hw = _pair(scan.hws[index]), _pair(image_set.hws[index])
        kind = SWAPPED_SIZE if lies_on_its_side(hw, annotated_hw) else OTHER_SIZE
        places_of[kind].append(other_size(paths[index], annotated_hw, hw))
    found = (findings_at(places, kind, image_set.split, _ADVICE[kind]) for kind, places in places_of.items())
    return list(chain.from_iterable(found))


def _pair(hw: np.ndarray) -> tuple[int, int]:
    return int(hw[0]), int(hw[1])


def _hw_as_read(path: str, annotated_hw: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of what `read_image` returns for these annotations; 0 if unknown."""
    hw = image_hw(path) or (0, 0)
    return hw[::-1] if lies_on_its_side(hw, annotated_hw) and is_transposed(path) else hw


def _decoded(path: str) -> tuple[bytes, bool, bool]:
    """Return the digest of a file's bytes, whether its image opens, and whether it is a dark one (see `Scan`)."""
    coded = content_of(path)
    if not len(coded):
        return b"", False, False
    content = coded.tobytes()
    is_jpeg = content[:2] == b"\xff\xd8"
    image = decode(coded, cv2.IMREAD_REDUCED_GRAYSCALE_8 if is_jpeg else cv2.IMREAD_GRAYSCALE)
    digest = blake2b(content, digest_size=16).digest()
    if image is None or (is_jpeg and not jpeg_ends(content)):
        return digest, False, False
    return digest, True, image.max() < _DARK_LEVELS and _has_dark_16_bits(coded)


def _has_dark_16_bits(coded: np.ndarray) -> bool:
    """Return whether a 16-bit image is dark, but not all black: rescaling would show nothing there."""
    deep = decode(coded, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    return deep is not None and deep.dtype == np.uint16 and 0 < int(deep.max()) < 256 * _DARK_LEVELS


def jpeg_ends(content: bytes) -> bool:
    """Return whether a JPEG has its end marker. OpenCV 4 decodes a truncated one, too, without an error."""
    if content.endswith(b"\xff\xd9"):
        return True
    start = 2
    while marker := _JPEG_MARKER.search(content, start):
        if marker.group() == b"\xff\xd9":
            return True
        # Skip the whole segment: a preview in it has its own end.
        start = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return False


@contextmanager
def _silent_decoders() -> Iterator[TextIO]:
    """Drop what libjpeg and libpng write to stderr without naming a file. Yields the real stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with open(kept, "w", closefd=False, encoding="utf-8", errors="backslashreplace") as stderr:
            yield stderr
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
