"""The cache gives back what was put in, or nothing: never another image, never a half one."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

import data.image_cache
from data.image_cache import ImageCache, file_stamp, open_cache, shrunk_hws, slot_bytes
from data.image_set import ImageSet
from tests.data.sets import noise_image_set, write_image
from utils.image_file import read_image

SLOT = 60 * 80 * 3  # of noise_set


def opened(
    kind: str, image_set: ImageSet, folder: Path, limit_bytes: int = 1 << 20, longest_px: int = 99
) -> ImageCache:
    with patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
        cache = open_cache(kind, image_set, longest_px=longest_px, limit_bytes=limit_bytes)
    assert cache is not None
    return cache


def fill(cache: ImageCache, image_set: ImageSet, index: int) -> np.ndarray:
    path = image_set[index].path
    image = read_image(path)
    assert image is not None
    cache.put(index, image, file_stamp(path))
    return image


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_was_put_in_comes_back(noise_set: ImageSet, tmp_path: Path, kind: str) -> None:
    cache = opened(kind, noise_set, tmp_path)
    assert cache.images == len(noise_set)
    images = {index: fill(cache, noise_set, index) for index in (10, 0, 3)}
    for index in range(len(noise_set)):
        kept = cache.get(index)
        assert (kept is not None) == (index in images)
        if kept is not None:
            np.testing.assert_array_equal(kept, images[index])
            assert not kept.flags.writeable


def test_a_smaller_image_fits_its_slot_and_a_larger_one_is_left_out(noise_set: ImageSet, tmp_path: Path) -> None:
    cache = opened("ram", noise_set, tmp_path)
    for index, hw in enumerate([(30, 40), (61, 80), (0, 0)]):
        cache.put(index, np.full((*hw, 3), 7, np.uint8), file_stamp(noise_set[index].path))
    kept = cache.get(0)
    assert kept is not None
    assert kept.shape == (30, 40, 3)
    assert cache.get(1) is cache.get(2) is None


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_share_it(noise_set: ImageSet, tmp_path: Path, kind: str, start: str) -> None:
    cache = opened(kind, noise_set, tmp_path)
    image = np.full((60, 80, 3), 5, np.uint8)
    arguments = (4, image, file_stamp(noise_set[4].path))
    other = multiprocessing.get_context(start).Process(target=cache.put, args=arguments)  # type: ignore[attr-defined]
    other.start()
    other.join(60)
    assert other.exitcode == 0
    np.testing.assert_array_equal(cache.get(4), image)


def test_no_more_is_kept_than_the_limit(noise_set: ImageSet, tmp_path: Path) -> None:
    cache = opened("disk", noise_set, tmp_path, limit_bytes=3 * SLOT + 1)
    assert cache.images == 3
    for index in range(len(noise_set)):
        fill(cache, noise_set, index)
    assert [cache.get(index) is not None for index in range(4)] == [True, True, True, False]
    (file,) = (tmp_path / "yolov4-norms").iterdir()
    assert file.stat().st_blocks * 512 < 4 * SLOT + 8192  # though its nominal size is that of all


def test_the_disk_outlives_the_run(noise_set: ImageSet, tmp_path: Path) -> None:
    image = fill(opened("disk", noise_set, tmp_path), noise_set, 5)
    np.testing.assert_array_equal(opened("disk", noise_set, tmp_path).get(5), image)
    assert opened("disk", noise_set, tmp_path, longest_px=70).get(5) is None
    assert opened("ram", noise_set, tmp_path).get(5) is None


@pytest.mark.parametrize("change", ["mtime", "size", "ctime", "inode", "gone"])
def test_a_changed_file_is_not_taken_from_the_disk(noise_set: ImageSet, tmp_path: Path, change: str) -> None:
    fill(opened("disk", noise_set, tmp_path), noise_set, 5)
    path = Path(noise_set[5].path)
    before = path.stat()
    if change == "mtime":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif change == "size":
        write_image(path, (30, 40))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "ctime":  # as of `cp -p`
        path.write_bytes(path.read_bytes()[::-1])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "inode":
        os.replace(shutil.copy2(path, tmp_path / "copy"), path)
    else:
        path.unlink()
    assert opened("disk", noise_set, tmp_path).get(5) is None


def test_relative_paths_mean_the_images_of_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets called `data` in two folders, with images of equal size and time, as reproducible archives have them."""
    kept = []
    for seed, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        image_set = noise_image_set(Path("data"), 1)
        write_image(Path("data/000.bmp"), (60, 80), seed)
        os.replace("data/000.bmp", "data/000.png")  # uncompressed, so that the sizes are equal
        os.utime("data/000.png", ns=(10**18, 10**18))
        cache = opened("disk", image_set, tmp_path)
        assert cache.get(0) is None
        kept.append(fill(cache, image_set, 0))
    assert len(list((tmp_path / "yolov4-norms").iterdir())) == 2
    assert not np.array_equal(*kept)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to("one/data")  # another way to the same files
    np.testing.assert_array_equal(opened("disk", image_set, tmp_path).get(0), kept[0])


def put_and_die(cache: ImageCache, image_set: ImageSet, writes: int) -> None:
    """Killed in the middle of the last of so many writes."""
    pwrite, done = os.pwrite, 0

    def dying(descriptor: int, content: memoryview, at: int) -> int:
        nonlocal done
        done += 1
        if done < writes:
            return pwrite(descriptor, content, at)
        pwrite(descriptor, content[: len(content) // 2], at)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    data.image_cache.os.pwrite = dying
    fill(cache, image_set, 2)


@pytest.mark.parametrize("writes", [1, 2])
def test_a_process_killed_while_it_writes_leaves_no_half_image(
    noise_set: ImageSet, tmp_path: Path, writes: int
) -> None:
    cache = opened("disk", noise_set, tmp_path)
    writer = multiprocessing.get_context("fork").Process(target=put_and_die, args=(cache, noise_set, writes))
    writer.start()
    writer.join(20)
    assert writer.exitcode == -signal.SIGKILL
    for each in (cache, opened("disk", noise_set, tmp_path)):
        assert each.get(2) is None
    image = fill(cache, noise_set, 2)
    np.testing.assert_array_equal(opened("disk", noise_set, tmp_path).get(2), image)


@pytest.mark.parametrize("is_part_left", [True, False])
def test_a_full_disk_is_one_warning_and_no_error(
    noise_set: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_part_left: bool,
) -> None:
    cache = opened("disk", noise_set, tmp_path)
    image = fill(cache, noise_set, 0)
    pwrite = os.pwrite

    def full(descriptor: int, content: memoryview, at: int) -> int:
        """Write half, as a disk does that fills up, then nothing."""
        if is_part_left:
            return pwrite(descriptor, content[: len(content) // 2], at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "pwrite", full)
        for index in (1, 2):
            fill(cache, noise_set, index)
    assert [record.getMessage() for record in caplog.records] == [
        "no more images fit the cache (No space left on device): the others are decoded each time"
    ]
    np.testing.assert_array_equal(cache.get(0), image)
    assert cache.get(1) is cache.get(2) is None
    later = opened("disk", noise_set, tmp_path)
    fill(later, noise_set, 1)
    assert later.get(1) is not None


def test_without_a_home_there_is_no_cache(noise_set: ImageSet, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert open_cache("disk", noise_set, longest_px=99) is None
    (said,) = caplog.messages
    assert said.startswith("no cache of decoded images: ") and "no home folder: set XDG_CACHE_HOME" in said


def test_a_folder_that_cannot_be_written_to(
    noise_set: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_cache("disk", noise_set, longest_px=99) is None
    assert "no cache of decoded images: " in caplog.text
    assert open_cache("off", noise_set, longest_px=99) is None


def test_by_default_a_share_of_what_is_free(
    noise_set: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.image_cache, "free_memory_bytes", lambda: 4 * (2 * SLOT))
    cache = open_cache("ram", noise_set, longest_px=99)
    assert cache is not None
    assert cache.images == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    disk = open_cache("disk", noise_set, longest_px=99)
    assert disk is not None
    assert disk.images == len(noise_set)


def test_images_are_shrunk_by_a_quarter_or_more_or_not_at_all() -> None:
    hws = np.array([(30, 40), (80, 100), (100, 133), (100, 134), (500, 1000), (2, 9000)])
    assert shrunk_hws(hws, 100).tolist() == [[30, 40], [80, 100], [100, 133], [75, 100], [50, 100], [1, 100]]


def test_slots_are_large_enough_for_every_reduction_and_hardly_larger() -> None:
    hws = np.random.default_rng(0).integers(1, 3000, (2000, 2)).astype(np.int32)
    for longest_px in (50, 624):
        slots = slot_bytes(hws, longest_px)
        factor = hws.max(axis=1) // longest_px
        step = np.select([factor >= 8, factor >= 4, factor >= 2], [8, 4, 2], 1)
        plain, reduced = (3 * shrunk_hws(hw, longest_px).prod(axis=1) for hw in (hws, -(-hws // step[:, None])))
        assert (slots >= np.maximum(plain, reduced)).all()
        assert slots.sum() < 1.1 * np.maximum(plain, reduced).sum()


def test_a_set_of_coco_s_size_takes_only_the_space_of_what_is_kept(tmp_path: Path) -> None:
    small = noise_image_set(tmp_path / "set", 1, hw=(480, 640))
    many = small.sample(1)
    many = type(many)(
        **{
            **{name: getattr(many, name) for name in many.__dataclass_fields__},
            "paths": np.repeat(many.paths, 120_000),
            "ids": np.arange(120_000),
            "hws": np.repeat(many.hws, 120_000, axis=0),
            "starts": np.zeros(120_001, np.int64),
        }
    )
    cache = opened("disk", many, tmp_path, limit_bytes=1 << 40, longest_px=624)
    (file,) = (tmp_path / "yolov4-norms").iterdir()
    assert cache.images == 120_000
    assert file.stat().st_size > 50e9
    assert file.stat().st_blocks * 512 < 1e6
    last = np.full((480, 640, 3), 9, np.uint8)
    cache.put(119_999, last, file_stamp(many[119_999].path))
    np.testing.assert_array_equal(cache.get(119_999), last)
