import logging
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.augment_options import AugmentOptions
from data.image_set import ImageSet, pack
from data.loader import (
    InputLayout,
    InputSizes,
    Loader,
    TrainBatchSampler,
    TrainLoader,
    make_eval_loader,
    make_train_loader,
    rect_hw,
)
from data.problems import Problems
from tests.data.sets import noise_image_set
from utils.errors import UserError
from utils.structures import Batch

LETTERBOX = InputLayout((64, 64), letterbox=True)


def loader(image_set: ImageSet, workers: int = 0, *, multi_scale: float = 1.4, **knobs: object) -> TrainLoader:
    settings = {"batch_size": 3, "augment": AugmentOptions(), "seed": 1}
    sizes = InputSizes((64, 64), multi_scale)
    return make_train_loader(image_set, sizes, workers=workers, **(settings | knobs))  # type: ignore[arg-type]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.targets.boxes, b.targets.boxes)
        and torch.equal(a.targets.image_index, b.targets.image_index)
        and a.image_ids == b.image_ids
        for a, b in zip(one, other, strict=True)
    )


def test_batches_do_not_depend_on_the_number_of_workers(noise_set: ImageSet) -> None:
    augment = AugmentOptions(blur=0.5, noise=0.5)
    alone, helped = (loader(noise_set, workers, augment=augment) for workers in (0, 2))
    epochs = []
    for epoch in range(2):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        epochs.append(list(alone))
        assert same(epochs[-1], list(helped))
        assert len(epochs[-1]) == len(alone) == 3
    assert not same(*epochs)
    # Resumed within an epoch, which has been announced to workers that are already running.
    helped.set_epoch(0, start_batch=1)
    assert same(list(helped), epochs[0][1:])
    fresh = loader(noise_set, augment=augment)
    fresh.set_epoch(1, start_batch=2)
    assert same(list(fresh), epochs[1][2:])


@pytest.mark.parametrize(("cache", "workers"), [("ram", 0), ("ram", 2), ("disk", 0), ("disk", 2)])
def test_batches_do_not_depend_on_the_cache(
    tmp_path: Path, cache: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image_set = noise_image_set(tmp_path / "large", 7, hw=(150, 200))  # larger than they are kept
    plain = loader(image_set, cache="off")
    kept = [loader(image_set, workers, cache=cache) for _ in range(2)]
    for epoch in range(2):
        for each in (plain, *kept):
            each.set_epoch(epoch)
        expected = list(plain)
        assert len(expected) == 2
        assert all(same(list(each), expected) for each in kept)  # the first one cold in epoch 0


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_killed_worker_changes_no_batch(noise_set: ImageSet, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def made(workers: int) -> Loader:
        if kind == "train":
            return loader(noise_set, workers, batch_size=2)
        return make_eval_loader(noise_set, LETTERBOX, batch_size=2, workers=workers)

    helped, batches = made(2), []
    with caplog.at_level(logging.WARNING):
        for batch in helped:
            batches.append(batch)
            if len(batches) == 1:
                os.kill(helped.worker_pids[1], signal.SIGKILL)
    assert same(batches, list(made(0)))
    assert [record.getMessage() for record in caplog.records] == [
        "a worker that loads images died (SIGKILL), another one replaces it"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_pinning_a_batch_ahead_changes_none(noise_set: ImageSet, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's part played by stand-ins, where there is none."""
    expected = list(loader(noise_set, batch_size=2))
    pinned_in, devices = set(), []

    def pinned(batch: Batch) -> Batch:
        pinned_in.add(threading.current_thread())
        return batch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(Batch, "pin_memory", pinned)
    helped = loader(noise_set, workers, batch_size=2)
    assert same(list(helped), expected)
    for _ in helped:  # left early
        break
    assert helped.worker_pids == []
    assert same(list(helped), expected)
    assert threading.current_thread() not in pinned_in
    assert devices == [3] * len(pinned_in) == [3] * 3


def test_an_error_comes_through_the_thread_that_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_set = noise_image_set(tmp_path, 2)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(UserError, match="none of its 2 images can be read"):
        list(loader(image_set, 1))


def test_loading_does_not_use_the_global_generator_of_torch(noise_set: ImageSet) -> None:
    before = torch.get_rng_state()
    assert len(list(loader(noise_set))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_set_smaller_than_a_batch_makes_one_smaller_batch(tmp_path: Path) -> None:
    small = loader(noise_image_set(tmp_path, 2), batch_size=8)
    assert [len(batch) for batch in small] == [2]
    assert len(small) == 1
    assert (small.batch_size, small.smallest_hw) == (2, (64, 64))


def test_empty_images_make_a_batch(tmp_path: Path) -> None:
    batch = next(iter(loader(noise_image_set(tmp_path, 1), batch_size=1)))
    assert (len(batch), len(batch.targets)) == (1, 0)


WIDE = InputSizes((128, 192), 1.4)


def keys(images: int = 1000, **knobs: object) -> TrainBatchSampler:
    settings = {"batch_size": 4, "sizes": WIDE, "seed": 0}
    return TrainBatchSampler(images, **(settings | knobs))  # type: ignore[arg-type]


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own() -> None:
    sampler = keys(103)
    orders = []
    for epoch in range(2):
        sampler.epoch = epoch
        flat = [key for batch in sampler for key in batch]
        assert [key.position for key in flat] == list(range(100))
        assert {key.epoch for key in flat} == {epoch}
        orders.append([key.image for key in flat])
        assert len(set(orders[-1])) == 100
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    assert orders[0] != [key.image for batch in keys(103, seed=1) for key in batch]


def test_the_last_batches_show_single_images_wherever_a_run_was_resumed() -> None:
    sampler = keys(103, single_from=30)
    for epoch, start in [(0, 0), (1, 0), (1, 6)]:
        sampler.epoch, sampler.start_batch = epoch, start
        flags = [{key.is_single for key in batch} for batch in sampler]
        assert flags == [{25 * epoch + batch >= 30} for batch in range(start, 25)]
    assert not any(key.is_single for batch in keys() for key in batch)


def test_closing_mosaic_leaves_the_batches_before_as_they_are(noise_set: ImageSet) -> None:
    augment = AugmentOptions(mosaic=1, mixup=0.5)
    opened, closed, helped = (loader(noise_set, workers, augment=augment) for workers in (0, 0, 2))
    for each in (closed, helped):
        each.close_mosaic(4)
    for epoch in range(2):
        for each in (opened, closed, helped):
            each.set_epoch(epoch)
        without, with_mosaic, again = list(closed), list(opened), list(helped)
        assert same(again, without)
        assert same(without[:1], with_mosaic[:1])
        assert same(without, with_mosaic) == (epoch == 0)
    assert all("+" not in path for batch in without[1:] for path in batch.paths)


def test_balanced_epochs_keep_their_length_and_ranks_their_shares(noise_set: ImageSet) -> None:
    shares = np.array([0.5] + [0.05] * 10)
    whole, *parts = (
        keys(11, batch_size=2, shares=shares, rank=rank, ranks=ranks) for rank, ranks in ((0, 1), (0, 2), (1, 2))
    )
    epochs = []
    for epoch in range(20):
        for each in (whole, *parts):
            each.epoch = epoch
        epochs.append([key for batch in whole for key in batch])
        assert [key.position for key in epochs[-1]] == list(range(10))
        assert [[*a, *b] for a, b in zip(*parts, strict=True)] == list(whole)
    counts = np.bincount([key.image for epoch in epochs for key in epoch]) / 200
    np.testing.assert_allclose(counts, shares, atol=0.05)
    assert epochs[0] != epochs[1]
    assert same(list(loader(noise_set, 2, balance=True)), list(loader(noise_set, balance=True)))


def test_input_sizes_change_every_ten_batches_within_their_bounds() -> None:
    sampler = keys()
    sizes = []
    for epoch in range(4):
        sampler.epoch = epoch
        for batch in sampler:
            assert len({key.input_hw for key in batch}) == 1
            sizes.append(batch[0].input_hw)
    tens = [sizes[i : i + 10] for i in range(0, len(sizes), 10)]
    assert all(len(set(ten)) == 1 for ten in tens)
    assert {height for height, _ in sizes} == {96, 128, 160}
    assert {width for _, width in sizes} == {160, 192, 224, 256}
    assert (WIDE.smallest, WIDE.largest) == ((96, 160), (160, 256))


def test_input_sizes_of_deeper_networks_change_in_larger_steps() -> None:
    sizes = {key.input_hw for batch in keys(sizes=InputSizes((256, 256), 1.4, step_px=64)) for key in batch}
    assert sizes == {(192, 192), (256, 256), (320, 320)}


def test_without_multi_scale_the_size_stays() -> None:
    assert {key.input_hw for batch in keys(sizes=InputSizes((128, 192))) for key in batch} == {(128, 192)}
    assert InputSizes((112, 80)).smallest == (112, 80)  # no multiples of 32


def test_ranks_share_each_batch_of_one_rank(noise_set: ImageSet) -> None:
    alone = loader(noise_set, batch_size=4)
    ranks = [loader(noise_set, batch_size=4, rank=rank, ranks=2) for rank in range(2)]
    for each in (alone, *ranks):
        each.set_epoch(1)
    assert [each.batch_size for each in ranks] == [4, 4]
    assert [len(each) for each in ranks] == [len(alone)] * 2
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert [len(share) for share in shares] == [2, 2]
        assert same(shares, list(whole.split(2)))


@pytest.mark.parametrize(
    ("images", "batch_size", "message"),
    [
        (11, 4, "a batch of 4 images is not divisible by the 3 ranks"),
        (5, 6, "a batch of 5 images, all that the 5 images of the set allow, is not divisible by the 3 ranks"),
    ],
)
def test_a_batch_that_ranks_cannot_share(images: int, batch_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        keys(images, batch_size=batch_size, ranks=3)


def test_ranks_evaluate_each_image_once(noise_set: ImageSet) -> None:
    def ids(rank: int, ranks: int) -> list[int]:
        share = make_eval_loader(noise_set, LETTERBOX, batch_size=2, workers=0, rank=rank, ranks=ranks)
        batches = list(share)
        assert len(share) == len(batches)
        return [image_id for batch in batches for image_id in batch.image_ids]

    assert [ids(rank, 3) for rank in range(3)] == [list(noise_set.image_ids[rank::3]) for rank in range(3)]
    assert ids(11, 12) == []


def mixed_set(folder: Path) -> ImageSet:
    """Seven images of 120x160, five of 160x120, five of 80x160, alternating."""
    sets = [
        noise_image_set(folder / str(hw), count, hw) for count, hw in ((7, (120, 160)), (5, (160, 120)), (5, (80, 160)))
    ]
    records = [each[i] for i in range(7) for each in sets if i < len(each)]
    records = [replace(record, image_id=number) for number, record in enumerate(records)]
    fields = {"name": "mixed", "split": "val", "problems": Problems(), "source": ""}
    return pack(records, class_names=sets[0].class_names, category_ids=(1, 2, 3), **fields)  # type: ignore[arg-type]


def test_rectangular_batches_are_the_square_ones_with_less_grey(tmp_path: Path) -> None:
    image_set = mixed_set(tmp_path)
    square, rect = (
        make_eval_loader(image_set, InputLayout((128, 128), True, rect=rect), batch_size=5, workers=0)
        for rect in (False, True)
    )
    whole = {batch.image_ids[i]: (batch.images[i], batch.placements[i]) for batch in square for i in range(len(batch))}
    batches = list(rect)
    assert [tuple(batch.images.shape[2:]) for batch in batches] == [(64, 128), (96, 128), (128, 128), (128, 96)]
    assert sorted(image_id for batch in batches for image_id in batch.image_ids) == list(range(17))
    for batch in batches:
        for image, image_id, placement in zip(batch.images, batch.image_ids, batch.placements, strict=True):
            assert placement is not None
            at, inside = whole[image_id]
            assert inside is not None
            assert (placement.scale_x, placement.scale_y) == (inside.scale_x, inside.scale_y)
            width, height = (round(side) for side in placement.image_px)
            (x, y), (left, top) = ((int(p.left_px), int(p.top_px)) for p in (placement, inside))
            assert torch.equal(image[:, y : y + height, x : x + width], at[:, top : top + height, left : left + width])


def test_a_rectangle_reaches_from_the_input_to_the_images() -> None:
    assert rect_hw(np.array([[480, 640]]), (416, 416), 32) == (320, 416)
    assert rect_hw(np.array([[480, 640], [640, 480]]), (416, 416), 32) == (416, 416)
    assert rect_hw(np.array([[10, 1000]]), (416, 416), 32) == (32, 416)
    assert rect_hw(np.array([[500, 500]]), (100, 120), 32) == (100, 120)  # no multiples of 32
    assert rect_hw(np.array([[480, 640]]), (512, 512), 64) == (384, 512)
    assert rect_hw(np.array([[400, 640]]), (512, 512), 64) == (320, 512)
    assert rect_hw(np.array([[410, 640]]), (512, 512), 64) == (384, 512)


def test_stretched_images_are_never_in_rectangular_batches() -> None:
    with pytest.raises(UserError, match="for letterboxed images"):
        InputLayout((64, 64), letterbox=False, rect=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_through_the_set_in_order(noise_set: ImageSet, workers: int) -> None:
    batches = list(make_eval_loader(noise_set, LETTERBOX, batch_size=4, workers=workers))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert tuple(image_id for batch in batches for image_id in batch.image_ids) == noise_set.image_ids
    assert sum(len(batch.targets) for batch in batches) == len(noise_set.boxes)
    assert all(placement is not None for batch in batches for placement in batch.placements)
