from pathlib import Path

import pytest
import torch

from data.augment import AugmentOptions
from data.image_set import ImageSet
from data.loader import EpochKeys, TrainLoader, make_eval_loader, make_train_loader
from tests.data.sets import picture_set
from utils.errors import UserError
from utils.structures import Batch


def loader(image_set: ImageSet, workers: int = 0, **knobs: object) -> TrainLoader:
    settings = {
        "batch_size": 3,
        "input_hw": (64, 64),
        "multi_scale": 1.4,
        "augment": AugmentOptions(),
        "seed": 1,
    }
    return make_train_loader(image_set, workers=workers, **(settings | knobs))  # type: ignore[arg-type]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.targets.boxes, b.targets.boxes)
        and torch.equal(a.targets.image_index, b.targets.image_index)
        and a.image_ids == b.image_ids
        for a, b in zip(one, other, strict=True)
    )


def test_batches_do_not_depend_on_the_number_of_workers(noise_set: ImageSet) -> None:
    alone, helped = loader(noise_set, workers=0), loader(noise_set, workers=2)
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
    fresh = loader(noise_set)
    fresh.set_epoch(1, start_batch=2)
    assert same(list(fresh), epochs[1][2:])


def test_loading_leaves_the_global_stream_of_torch_alone(noise_set: ImageSet) -> None:
    before = torch.get_rng_state()
    assert len(list(loader(noise_set))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_set_smaller_than_a_batch_makes_one_smaller_batch(tmp_path: Path) -> None:
    small = loader(picture_set(tmp_path, 2), batch_size=8)
    assert [len(batch) for batch in small] == [2]
    assert len(small) == 1
    assert (small.batch_size, small.smallest_hw) == (2, (64, 64))


def test_empty_pictures_make_a_batch(tmp_path: Path) -> None:
    batch = next(iter(loader(picture_set(tmp_path, 1), batch_size=1)))
    assert (len(batch), len(batch.targets)) == (1, 0)


def keys(pictures: int = 1000, **knobs: object) -> EpochKeys:
    settings = {"batch_size": 4, "input_hw": (128, 192), "multi_scale": 1.4, "seed": 0}
    return EpochKeys(pictures, **(settings | knobs))  # type: ignore[arg-type]


def test_an_epoch_shows_each_picture_once_in_an_order_of_its_own() -> None:
    sampler = keys(103)
    orders = []
    for epoch in range(2):
        sampler.epoch = epoch
        flat = [key for batch in sampler for key in batch]
        assert [key.position for key in flat] == list(range(100))
        assert {key.epoch for key in flat} == {epoch}
        orders.append([key.picture for key in flat])
        assert len(set(orders[-1])) == 100
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    assert orders[0] != [key.picture for batch in keys(103, seed=1) for key in batch]


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
    assert (sampler.smallest_hw(), sampler.largest_hw()) == ((96, 160), (160, 256))


def test_without_multi_scale_the_size_stays() -> None:
    assert {key.input_hw for batch in keys(multi_scale=1.0) for key in batch} == {(128, 192)}
    assert keys(multi_scale=1.0, input_hw=(112, 80)).smallest_hw() == (112, 80)  # no multiples of 32


@pytest.mark.parametrize("knob", [{"batch_size": 0}, {"workers": -1}, {"multi_scale": 0.5}])
def test_impossible_settings(noise_set: ImageSet, knob: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(knob))}={next(iter(knob.values()))}"):
        loader(noise_set, **knob)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_through_the_set_in_order(noise_set: ImageSet, workers: int) -> None:
    batches = list(make_eval_loader(noise_set, batch_size=4, input_hw=(64, 64), letterbox=True, workers=workers))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert tuple(image_id for batch in batches for image_id in batch.image_ids) == noise_set.image_ids
    assert sum(len(batch.targets) for batch in batches) == len(noise_set.boxes)
    assert all(placement is not None for batch in batches for placement in batch.placements)
