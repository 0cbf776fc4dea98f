"""Every image of a split read, decoded and fingerprinted, once."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np
from tqdm import tqdm

from data.doctor.finding import Finding
from data.doctor.labels import SWAPPED_ADVICE
from data.image_file import decode, image_hw, is_transposed, lies_on_its_side
from data.image_set import ImageSet
from data.problems import SWAPPED_SIZE, other_size

LOOK_PX = 16
UNREADABLE = ("image that does not open", "images that do not open")
OTHER_SIZE = ("image of another size than annotated", "images of another size than annotated")
DARK = ("image of 16 bits that is nearly black in 8", "images of 16 bits that are nearly black in 8")

_ADVICE = {
    UNREADABLE: "Cut off or damaged: training takes another image or sees grey from there on, and evaluation counts "
    "objects there as missed. Restore or remove it.",
    DARK: "Of 16 bits the upper 8 are read, so that values up to 4095 become 0 to 15 of 255: next to nothing can be "
    "seen. Rescale the values to 0 to 255, and save 8 bits.",
    SWAPPED_SIZE: SWAPPED_ADVICE,
    OTHER_SIZE: "Boxes are scaled along with the image, which is right only if they were drawn at the size that is "
    "written there. Look at a few; if they are off, correct the written size.",
}
_DARK_LEVELS = 32  # of 256; what has none brighter is dark
_REDUCED = {
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
}
_CHUNK = 32  # images a thread takes at a time
# Those that a JPEG's length field follows, and the end, D9: no stuffed FF, no restart within a scan, no start.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """Of N images: digests, N of all bytes; opens (N,) bool; hws (N, 2), as they are read, 0 where unknown.

    looks: (N, LOOK_PX ** 2) uint8, each image as a tiny grey one; all 0 where it does not open. dark: (N,) bool,
    those of 16 bits that are nearly black as they are read.
    """

    digests: list[bytes]
    opens: np.ndarray
    hws: np.ndarray
    looks: np.ndarray
    dark: np.ndarray


def scan_images(image_set: ImageSet, threads: int) -> Scan:
    """With a progress bar. A file is read once; JPEGs are decoded whole, though at a fraction of their size."""
    count = len(image_set)
    digests = [b""] * count
    opens, dark, hws = np.zeros(count, bool), np.zeros(count, bool), np.zeros((count, 2), np.int32)
    looks = np.zeros((count, LOOK_PX**2), np.uint8)

    def scan(first: int) -> int:
        last = min(first + _CHUNK, count)
        for index in range(first, last):
            path = os.fsdecode(image_set.paths[index])
            digests[index], look, dark[index] = _seen(path, int(image_set.hws[index].min()))
            if look is not None:
                opens[index], looks[index] = True, look
                hws[index] = _hw_as_read(path, _pair(image_set.hws[index]))
        return last - first

    with _silent_decoders() as stderr, ThreadPoolExecutor(threads) as pool:
        # Into a file or a pipe, a line every half minute is plenty.
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
    return Scan(digests=digests, opens=opens, hws=hws, looks=looks, dark=dark)


def image_findings(image_set: ImageSet, scan: Scan) -> list[Finding]:
    paths = [os.fsdecode(path) for path in image_set.paths]
    found: dict[tuple[str, str], list[str]] = {
        UNREADABLE: [paths[index] for index in np.flatnonzero(~scan.opens)],
        DARK: [paths[index] for index in np.flatnonzero(scan.dark)],
        SWAPPED_SIZE: [],
        OTHER_SIZE: [],
    }
    differs = (scan.hws != image_set.hws).any(axis=1) & (scan.hws > 0).all(axis=1)
    for index in np.flatnonzero(differs):
        hw, annotated_hw = _pair(scan.hws[index]), _pair(image_set.hws[index])
        kind = SWAPPED_SIZE if lies_on_its_side(hw, annotated_hw) else OTHER_SIZE
        found[kind].append(other_size(paths[index], annotated_hw, hw))
    return [
        Finding(kind=kind, where=image_set.split, count=len(places), advice=_ADVICE[kind], places=tuple(places))
        for kind, places in found.items()
        if places
    ]


def _pair(hw: np.ndarray) -> tuple[int, int]:
    return int(hw[0]), int(hw[1])


def _hw_as_read(path: str, annotated_hw: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what `read_image` gives for these annotations; 0 where unknown."""
    hw = image_hw(path) or (0, 0)
    return hw[::-1] if lies_on_its_side(hw, annotated_hw) and is_transposed(path) else hw


def _seen(path: str, shorter_px: int) -> tuple[bytes, np.ndarray | None, bool]:
    """The digest of a file's bytes, its image as (LOOK_PX ** 2,) grey values, and whether it is a dark one (`Scan`).

    None where it does not open.
    """
    try:
        content = Path(path).read_bytes()
    except OSError:
        return b"", None, False
    flag = cv2.IMREAD_GRAYSCALE
    is_jpeg = content[:2] == b"\xff\xd8"
    if is_jpeg:  # only JPEG's own reduction averages; other formats' would skip pixels
        flag = next((_REDUCED[step] for step in (8, 4, 2) if shorter_px >= 4 * LOOK_PX * step), flag)
    coded = np.frombuffer(content, np.uint8)
    image = decode(coded, flag)
    digest = blake2b(content, digest_size=16).digest()
    if image is None or (is_jpeg and not jpeg_ends(content)):
        return digest, None, False
    look = cv2.resize(image, (LOOK_PX, LOOK_PX), interpolation=cv2.INTER_AREA).reshape(-1)
    return digest, look, image.max() < _DARK_LEVELS and _has_dark_16_bits(coded)


def _has_dark_16_bits(coded: np.ndarray) -> bool:
    """All black is none: no rescaling would show more."""
    deep = decode(coded, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    return deep is not None and deep.dtype == np.uint16 and 0 < int(deep.max()) < 256 * _DARK_LEVELS


def jpeg_ends(content: bytes) -> bool:
    """Whether a JPEG has its end. OpenCV 4 decodes one that was cut off, too, and says nothing."""
    if content.endswith(b"\xff\xd9"):
        return True
    place = 2
    while marker := _JPEG_MARKER.search(content, place):
        if marker.group() == b"\xff\xd9":
            return True
        # Segments are passed over whole: a preview in them has an end of its own.
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return False


@contextmanager
def _silent_decoders() -> Iterator[TextIO]:
    """-> stderr to write to, while what libjpeg and libpng write there by themselves, naming no file, is dropped."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with open(kept, "w", closefd=False, errors="backslashreplace") as stderr:
            yield stderr
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
