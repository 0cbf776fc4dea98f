"""Decoded images in one file that all loader processes map: in memory (`ram`) or in the user's cache folder (`disk`).

Every image has a slot of its own, laid out beforehand from the sizes in the index, so that processes agree without
talking to each other; two that fill a slot at once write the same bytes. The file begins with a _HEADER, then there
is an _ENTRY for each image, then the slots. It is sparse: only what was written takes space.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import shutil
import tempfile
import time
import zlib
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.image_set import ImageSet
from utils.memory import free_memory_bytes

log = logging.getLogger(__name__)

CACHES = ("ram", "disk", "off")

_HEADER = 64  # bytes; the first is 1 once no more room was found
# Of a filled slot: file_bytes (never 0) and file_mtime_ns of the image's file, the image's size, and its crc32:
# after a power failure an entry may have reached the disk before its pixels.
_ENTRY = np.dtype(
    [("file_bytes", "<u8"), ("file_mtime_ns", "<i8"), ("height", "<u4"), ("width", "<u4"), ("crc32", "<u4")]
)
_EXCESS = 4 / 3
_UNUSED_DAYS = 30
_SHARE_OF_FREE = {"ram": 0.25, "disk": 0.5}


class ImageCache:
    """index -> (H, W, 3) uint8, read-only, in the size of `shrunk_hws`.

    descriptor: of the file, open for reading and writing; `limit_bytes` of pixels are kept, those of the first
    images of the set.
    """

    def __init__(self, descriptor: int, image_set: ImageSet, *, longest_px: int, limit_bytes: int) -> None:
        self._descriptor = descriptor
        self._image_set = image_set
        ends = np.cumsum(slot_bytes(image_set.hws, longest_px))
        self.images = int(np.searchsorted(ends, limit_bytes, side="right"))
        pixels_start = _HEADER + len(image_set) * _ENTRY.itemsize
        self._starts = pixels_start + np.concatenate([[0], ends])
        # Always the same for the same images, so that no run can shorten what another has mapped.
        os.ftruncate(descriptor, int(self._starts[-1]))
        _write(descriptor, bytes(_HEADER), 0)
        self._open_map()

    def _open_map(self) -> None:
        self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._entries = np.frombuffer(self._map, _ENTRY, count=len(self._image_set), offset=_HEADER)
        self._checked = np.zeros(self.images, bool)  # by this process
        self._accepts = True

    def get(self, index: int) -> np.ndarray | None:
        """None where it has to be read from its file: not kept yet, or the file has changed since."""
        if index >= self.images or self._entries[index]["file_bytes"] == 0:
            return None
        entry, start, stop = self._entries[index], self._starts[index], self._starts[index + 1]
        height, width = int(entry["height"]), int(entry["width"])
        if not 0 < 3 * height * width <= stop - start:
            return None
        pixels = self._bytes[start : start + 3 * height * width]
        if not self._checked[index]:
            if file_stamp(self._image_set[index].path) != (entry["file_bytes"], entry["file_mtime_ns"]):
                return None
            if zlib.crc32(pixels) != entry["crc32"]:
                return None
            self._checked[index] = True
        return pixels.reshape(height, width, 3)

    def put(self, index: int, image: np.ndarray, stamp: tuple[int, int] | None) -> None:
        """stamp: the `file_stamp` from before the image was read. A full disk is said once and no error."""
        if index >= self.images or not self._accepts or stamp is None:
            return
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        if image.nbytes > stop - start:  # its file is larger than the index says
            return
        pixels = np.ascontiguousarray(image).reshape(-1)
        entry = np.array([(*stamp, *image.shape[:2], zlib.crc32(pixels))], _ENTRY).tobytes()
        try:
            # Written, not stored through the map, where a full disk would be a signal that kills. The entry comes
            # last: a process that is killed before leaves an empty slot.
            _write(self._descriptor, pixels.data, start)
            _write(self._descriptor, entry, _HEADER + index * _ENTRY.itemsize)
        except OSError as error:
            self._full(error)
        else:
            self._checked[index] = True

    def _full(self, error: OSError) -> None:
        self._accepts = False
        if self._bytes[0] == 0:  # no other process has said so
            log.warning("no more images fit the cache (%s): the others are decoded each time", error.strerror)
        with suppress(OSError):
            _write(self._descriptor, b"\1", 0)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked: they get a descriptor of their own."""
        state = {name: value for name, value in vars(self).items() if name not in ("_map", "_bytes", "_entries")}
        return state | {"_descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_descriptor": state["_descriptor"].detach()})
        self._open_map()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def open_cache(
    kind: str, image_set: ImageSet, *, longest_px: int, limit_bytes: int | None = None, folder: Path | None = None
) -> ImageCache | None:
    """kind: of CACHES. limit_bytes: by default a quarter of the free memory, or half of the free disk.

    folder: for `disk`, by default the user's cache folder. None, with a line, where it cannot be written to.
    """
    if kind == "off":
        return None
    try:
        if kind == "ram":
            descriptor, free = _memory_file(), free_memory_bytes()
        else:
            folder = folder or _user_folder()
            descriptor = _disk_file(folder, image_set, longest_px)
            # What the file already takes is this cache's own.
            free = shutil.disk_usage(folder).free + 2 * 512 * os.fstat(descriptor).st_blocks
        limit = int(_SHARE_OF_FREE[kind] * free) if limit_bytes is None else limit_bytes
        return ImageCache(descriptor, image_set, longest_px=longest_px, limit_bytes=limit)
    except OSError as error:
        log.warning("no cache of decoded images: %s", error)
        return None


def shrunk_hws(hws: np.ndarray, longest_px: int) -> np.ndarray:
    """(N, 2) heights and widths of decoded images -> as they are kept: the longer side `longest_px`.

    What exceeds it by less than a third stays as it is: averaging takes more time than decoding, and would save little.
    """
    scale = longest_px / hws.max(axis=1, keepdims=True)
    shrunk = np.maximum(1, np.round(hws * scale)).astype(np.int64)
    return np.where(_EXCESS * scale >= 1, hws, shrunk)


def slot_bytes(hws: np.ndarray, longest_px: int) -> np.ndarray:
    """(N,) int64: enough for the images (N, 2) of an index, however reduced they are decoded (`read_image`)."""
    hws, longest = hws.astype(np.int64), hws.max(axis=1)
    needed = 3 * shrunk_hws(hws, longest_px).prod(axis=1)
    for step in (2, 4, 8):
        reduced = 3 * shrunk_hws(-(-hws // step), longest_px).prod(axis=1)
        needed = np.where(longest >= step * longest_px, np.maximum(needed, reduced), needed)
    return needed


def file_stamp(path: str) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns: what tells a file from another of its name. None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _memory_file() -> int:
    """A file without a name, which is gone with the last process that has it open, however that ended."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("images")  # unlike /dev/shm, which containers keep small
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _disk_file(folder: Path, image_set: ImageSet, longest_px: int) -> int:
    """The file of exactly these images; files that nobody has opened for a month go."""
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.glob("*.pixels"):
        with suppress(FileNotFoundError):  # another run was quicker
            if time.time() - other.stat().st_mtime > _UNUSED_DAYS * 86400:
                other.unlink()
    told = hashlib.blake2b(f"{longest_px} {cv2.__version__}".encode(), digest_size=12)
    told.update(image_set.paths.tobytes())
    told.update(image_set.hws.tobytes())
    path = folder / f"{image_set.name}-{image_set.split}-{told.hexdigest()}.pixels"
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _user_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolov4-norms"


def _write(descriptor: int, content: bytes | memoryview, at: int) -> None:
    """All of it, which one call need not write."""
    left = memoryview(content).cast("B")
    while left:
        written = os.pwrite(descriptor, left, at)
        left, at = left[written:], at + written
