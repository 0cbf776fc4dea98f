"""Cache of decoded images: one file mapped by all loader processes, in memory (`ram`) or on disk (`disk`).

The sizes in the index give each image a slot, so processes need no communication; two that fill a slot at once write
the same bytes. The file holds one _ENTRY per image, then the slots; it is sparse: only what was written takes space. An
image's entry is written after its pixels, which is enough for a killed process, though not for a power failure: delete
a disk cache that was being filled then.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import mmap
import os
import shutil
import tempfile
from functools import cache
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.image_set import ImageSet
from utils.cache_folder import cache_folder
from utils.memory import free_memory_bytes

log = logging.getLogger(__name__)

CACHES = ("ram", "disk", "off")

FileStamp = tuple[int, int, int, int]  # size in bytes, mtime and ctime in ns, inode

# All zero for an empty slot. The stamp comes last: with half an entry it matches no file.
_ENTRY = np.dtype(
    [("height", "<u4"), ("width", "<u4"), ("size", "<i8"), ("mtime_ns", "<i8"), ("ctime_ns", "<i8"), ("inode", "<u8")]
)
_EXCESS = 4 / 3
_SHARE_OF_FREE = {"ram": 0.25, "disk": 0.5}


class ImageCache:
    """index -> (H, W, 3) uint8, read-only, in the size of `shrunk_hws`.

    descriptor: of the file, open for reading and writing. limit_bytes: of pixels; the first images of the set that fit
    are kept.
    """

    def __init__(self, descriptor: int, image_set: ImageSet, *, longest_px: int, limit_bytes: int) -> None:
        self._descriptor = descriptor
        self._image_set = image_set
        ends = np.cumsum(slot_bytes(image_set.hws, longest_px))
        self.images = int(np.searchsorted(ends, limit_bytes, side="right"))
        self._starts = len(image_set) * _ENTRY.itemsize + np.concatenate([[0], ends])
        # The same size in every run over these images, so that no run shortens a file that another has mapped.
        os.ftruncate(descriptor, int(self._starts[-1]))
        self._open_map()

    def _open_map(self) -> None:
        mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(mapped, np.uint8)
        self._entries = np.frombuffer(mapped, _ENTRY, count=len(self._image_set))
        self._is_current = np.zeros(self.images, bool)  # entries that this process has compared with their files
        self._is_full = False

    def get(self, index: int) -> np.ndarray | None:
        """Return the image, or None if it has to be read from its file: not kept yet, or the file has changed."""
        if index >= self.images:
            return None
        height, width, *stamp = self._entries[index].item()
        start, stop = self._starts[index], self._starts[index + 1]
        if not 0 < 3 * height * width <= stop - start:
            return None
        if not self._is_current[index]:
            if file_stamp(self._image_set[index].path) != tuple(stamp):
                return None
            self._is_current[index] = True
        return self._bytes[start : start + 3 * height * width].reshape(height, width, 3)

    def put(self, index: int, image: np.ndarray, stamp: FileStamp | None) -> None:
        """Keep an image. stamp: `file_stamp` from before the image was read. A full disk is a warning, not an error."""
        if index >= self.images or self._is_full or stamp is None:
            return
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        if image.nbytes > stop - start:  # the file is larger than its annotations say
            return
        entry = np.array([(*image.shape[:2], *stamp)], _ENTRY)
        try:
            # Not stored through the map, where a full disk would raise SIGBUS.
            if os.pwrite(self._descriptor, np.ascontiguousarray(image).data, start) < image.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.pwrite(self._descriptor, entry.tobytes(), index * _ENTRY.itemsize)
        except OSError as error:
            self._is_full = True
            log.warning("no more images fit the cache (%s): the others are decoded each time", error.strerror)
        else:
            self._is_current[index] = True

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker that is not forked, with a descriptor of its own."""
        state = {name: value for name, value in vars(self).items() if name not in ("_bytes", "_entries")}
        return state | {"_descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_descriptor": state["_descriptor"].detach()})
        self._open_map()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def open_cache(kind: str, image_set: ImageSet, *, longest_px: int, limit_bytes: int | None = None) -> ImageCache | None:
    """Return the cache of kind `ram` or `disk`; None for `off`, and with a warning where it cannot be written.

    `disk` is in the user's cache folder. limit_bytes: by default a quarter of the free memory or half of the free disk.
    """
    if kind == "off":
        return None
    try:
        if kind == "ram":
            descriptor, free = _memory_file(), free_memory_bytes()
        else:
            folder = cache_folder()
            descriptor = _disk_file(folder, image_set, longest_px)
            # The blocks that the file already takes count as free, twice because half of the sum is used.
            free = shutil.disk_usage(folder).free + 2 * 512 * os.fstat(descriptor).st_blocks
        limit = int(_SHARE_OF_FREE[kind] * free) if limit_bytes is None else limit_bytes
        return ImageCache(descriptor, image_set, longest_px=longest_px, limit_bytes=limit)
    except (OSError, RuntimeError) as error:  # the latter of a user without a home
        log.warning("no cache of decoded images: %s", error)
        return None


def shrunk_hws(hws: np.ndarray, longest_px: int) -> np.ndarray:
    """(N, 2) heights and widths of decoded images -> (N, 2) as they are kept: the longer side `longest_px`.

    An image that exceeds it by less than a third stays as it is: averaging takes more time than decoding, and would
    save little.
    """
    scale = longest_px / hws.max(axis=1, keepdims=True)
    shrunk = np.maximum(1, np.round(hws * scale)).astype(np.int64)
    return np.where(_EXCESS * scale >= 1, hws, shrunk)


def slot_bytes(hws: np.ndarray, longest_px: int) -> np.ndarray:
    """(N, 2) sizes in the index -> (N,) int64 bytes, enough for any reduction that `read_image` may choose."""
    hws, longest = hws.astype(np.int64), hws.max(axis=1)
    required = 3 * shrunk_hws(hws, longest_px).prod(axis=1)
    for step in (2, 4, 8):
        reduced = 3 * shrunk_hws(-(-hws // step), longest_px).prod(axis=1)
        required = np.where(longest >= step * longest_px, np.maximum(required, reduced), required)
    return required


def file_stamp(path: str) -> FileStamp | None:
    """Return what tells a file from an earlier or another one at the same path; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _memory_file() -> int:
    """Open a nameless file that disappears with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("images")  # unlike /dev/shm, which containers keep small
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _disk_file(folder: Path, image_set: ImageSet, longest_px: int) -> int:
    """Open the file of exactly these images, in this size and decoded by this OpenCV."""
    folder.mkdir(parents=True, exist_ok=True)
    real_folder = cache(os.path.realpath)  # once per folder; the same relative path may lead to other images
    digest = hashlib.blake2b(f"{longest_px} {cv2.__version__}".encode(), digest_size=12)
    for path in image_set.paths.tolist():
        parent, name = os.path.split(path)
        digest.update(os.path.join(real_folder(parent), name) + b"\0")
    digest.update(image_set.hws.tobytes())
    path = folder / f"{image_set.name}-{image_set.split}-{digest.hexdigest()}.pixels"
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
