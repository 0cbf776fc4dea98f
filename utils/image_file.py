"""Image files: their size from the first bytes, and their pixels."""

from __future__ import annotations

import os
import struct
import warnings
from contextlib import suppress
from io import BytesIO
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

# The first frame of a .gif is read. Whether .avif and .jp2 can be depends on how OpenCV was built.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".jfif", ".jpe", ".gif", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"),
)
_MOST_SIDE_PX = 65535  # a JPEG's
MOST_PIXELS = int(os.environ.get("OPENCV_IO_MAX_IMAGE_PIXELS", 100_000_000))  # OpenCV's own variable; 300 MB decoded
_MOST_BYTES = 8 * MOST_PIXELS  # of a file: 16 bits of four channels, uncompressed
Image.MAX_IMAGE_PIXELS = MOST_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `decode` refuses with a reason
_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_Header = tuple[tuple[int, int], bool]  # height and width as stored, and whether EXIF transposes them
_MOST_EXIF = 1 << 16  # bytes read of a chunk, which may claim any length
_JPEG_START = b"\xff\xd8"
# JPEG start-of-frame markers; C4, C8 and CC lie among them but are tables.
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def is_plausible(hw: tuple[int, int]) -> bool:
    """Return whether an image may have this size: a header of a few bytes must not fill the memory."""
    return min(hw) > 0 and max(hw) <= _MOST_SIDE_PX and hw[0] * hw[1] <= MOST_PIXELS


def image_fault(path: str) -> str:
    """Return the path and, if that is why `read_image` refuses it, that the size in its header is out of limits."""
    hw = _stated_hw(content_of(path))
    if hw is None or is_plausible(hw):
        return path
    limit = f"{MOST_PIXELS / 1e6:g} megapixels (the environment's OPENCV_IO_MAX_IMAGE_PIXELS changes that)"
    return f"{path}: its header claims no area, or more than {limit}"


def image_hw(path: str) -> tuple[int, int] | None:
    """Return height and width as `read_image` gives them, or None if there is no readable image.

    Reads the header of JPEG and PNG and decodes other formats. A truncated image is only noticed by `read_image`.
    """
    header = _header(path)
    if header is not None:
        stored_hw, transposed = header
        if not is_plausible(stored_hw):
            return None
        return stored_hw[::-1] if transposed else stored_hw
    image = decode(content_of(path), cv2.IMREAD_COLOR)
    return None if image is None else image.shape[:2]


def is_transposed(path: str) -> bool:
    """Return whether an EXIF orientation of 5 to 8 makes `read_image` turn the file's image by a quarter.

    Reads the header of JPEG and PNG and decodes other formats twice, where a square counts as not turned.
    """
    header = _header(path)
    if header is not None:
        return header[1]
    content = content_of(path)
    upright, stored = (decode(content, cv2.IMREAD_COLOR | flag) for flag in (0, cv2.IMREAD_IGNORE_ORIENTATION))
    return upright is not None and stored is not None and upright.shape != stored.shape


def lies_on_its_side(hw: tuple[int, int], annotated_hw: tuple[int, int]) -> bool:
    return (hw[0] - hw[1]) * (annotated_hw[0] - annotated_hw[1]) < 0


def hw_of_boxes(annotated_hw: tuple[int, int], image_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the size that boxes refer to. image_hw: of what `read_image` gives for source_hw=annotated_hw.

    If that still lies on its side, no EXIF tag is the reason: width and height were swapped in the annotation.
    """
    return annotated_hw[::-1] if lies_on_its_side(image_hw, annotated_hw) else annotated_hw


def read_image(
    path: str, *, source_hw: tuple[int, int] | None = None, enough_px: int | None = None
) -> np.ndarray | None:
    """Read (H, W, 3) uint8 RGB, turned as the EXIF tag says; also from grey or transparent images. None if unreadable.

    source_hw: the size that annotations assume; if that is the image lying on its side, the EXIF tag is ignored, and
    without a tag the image stays as it is (`hw_of_boxes`). enough_px: the longer side may be smaller than on disk, but
    not smaller than this: a JPEG is then decoded at a half, a quarter or an eighth, sides rounded up, in less time.
    """
    content = content_of(path)
    flag = cv2.IMREAD_COLOR if enough_px is None else _reduced(content, enough_px)
    image = decode(content, flag)
    if image is not None and source_hw is not None and lies_on_its_side(image.shape[:2], source_hw):
        image = decode(content, flag | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def content_of(path: str) -> np.ndarray:
    """Read (B,) uint8 bytes, (0,) if that fails. Unlike cv2.imread, takes any file name on any system."""
    with suppress(OSError):
        if _may_hold_an_image(path):
            return np.fromfile(path, np.uint8)
    return np.empty(0, np.uint8)


def _may_hold_an_image(path: str) -> bool:
    """Return whether the file has an end, unlike a FIFO or a device, and one that can be. Raises OSError."""
    return os.path.isfile(path) and os.path.getsize(path) <= _MOST_BYTES


def decode(content: np.ndarray, flag: int) -> np.ndarray | None:
    """Decode (B,) uint8 bytes with a flag of cv2.imdecode; None if they are no image of a size that `is_plausible`."""
    hw = _stated_hw(content)
    if hw is not None and not is_plausible(hw):
        return None
    try:
        return cv2.imdecode(content, flag) if len(content) else None
    except cv2.error:
        return None


def _stated_hw(content: np.ndarray) -> tuple[int, int] | None:
    """Return the size in the header of (B,) uint8 bytes; None where only OpenCV knows it, or nobody."""
    header = _header_of(BytesIO(content.data))
    if header is not None:
        return header[0]
    try:
        with Image.open(BytesIO(content.data)) as image:  # reads the header only
            return image.height, image.width
    except Image.DecompressionBombError:  # more than twice the limit
        return _MOST_SIDE_PX + 1, _MOST_SIDE_PX + 1
    except Exception:  # whatever damaged bytes trigger
        return None


def _reduced(content: np.ndarray, enough_px: int) -> int:
    """Return OpenCV's flag for the smallest sufficient size, by the file's header, as annotations may be wrong."""
    header = _header_of(BytesIO(content.data)) if content[:2].tobytes() == _JPEG_START else None
    factor = max(header[0]) // enough_px if header else 1
    return next((_REDUCED[step] for step in (8, 4, 2) if factor >= step), cv2.IMREAD_COLOR)


def _header(path: str) -> _Header | None:
    """Read the header of a JPEG or PNG; None for other formats, and if it is incomplete."""
    with suppress(OSError):
        if _may_hold_an_image(path):
            with open(path, "rb") as file:
                return _header_of(file)
    return None


def _header_of(file: BinaryIO) -> _Header | None:
    try:
        start = file.read(24)
        if start[:8] == b"\x89PNG\r\n\x1a\n" and start[12:16] == b"IHDR":
            width, height = struct.unpack(">II", start[16:])
            return (height, width), _png_is_transposed(file)
        if start[:2] == _JPEG_START:
            file.seek(2)
            return _jpeg_header(file)
    except struct.error:
        pass
    return None


def _png_is_transposed(file: BinaryIO) -> bool:
    """Walk the chunks up to an EXIF one, which may transpose the image."""
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            return _transposes(file.read(min(length, _MOST_EXIF)))
        file.seek(length + 4, 1)  # with its checksum
    return False


def _jpeg_header(file: BinaryIO) -> _Header | None:
    """Walk the segments up to the frame header; an EXIF one before it may transpose the image."""
    transposed = False
    while True:
        marker = file.read(2)
        if len(marker) < 2 or marker[0] != 0xFF:
            return None
        if marker[1] == 0xFF:  # a fill byte
            file.seek(-1, 1)
            continue
        length = struct.unpack(">H", file.read(2))[0]
        if length < 2:  # it counts its own two bytes
            return None
        if marker[1] in _JPEG_FRAMES:
            height, width = struct.unpack(">xHH", file.read(5))
            return (height, width), transposed
        segment = file.read(length - 2)
        if marker[1] == 0xE1 and segment[:6] == b"Exif\0\0":
            transposed = _transposes(segment[6:])


def _transposes(tiff: bytes) -> bool:
    """Return whether the Orientation tag (0x0112) of the first directory is 5 to 8."""
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        directory = struct.unpack_from(order + "I", tiff, 4)[0]
        for entry in range(struct.unpack_from(order + "H", tiff, directory)[0]):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:
                return 5 <= value <= 8
    except struct.error:
        pass
    return False
