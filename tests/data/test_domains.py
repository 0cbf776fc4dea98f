"""Several data sets as one, and the order and the mini-batches that they make."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.annotation_formats import open_image_set
from data.augment_options import AugmentOptions
from data.digits import make_digits
from data.domains import interleaved, joined, unique_names
from data.image_set import ImageSet
from data.loader import InputSizes, TrainLoader, make_train_loader
from utils.structures import Batch, Targets


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ImageSet]:
    """The second has fewer images, and some of the first one's classes under other labels."""
    folder = tmp_path_factory.mktemp("domains")
    first, second = (
        open_image_set(make_digits(folder / name, counts={"train": count}, hw=(32, 32), seed=seed), "train")
        for name, count, seed in (("a", 12, 0), ("b", 4, 1))
    )
    return [first.of_classes(list("0123456")), second.of_classes(list("456789"))]


def test_objects_keep_their_class_name_and_images_their_objects(sets: list[ImageSet]):
    whole = joined(sets)
    assert whole.class_names == tuple("0123456789")
    assert len(set(whole.image_ids)) == len(whole) == 16
    records = [(each, each[index]) for each in sets for index in range(len(each))]
    for index, (source, record) in enumerate(records):
        found = whole[index]
        assert (found.path, found.hw) == (record.path, record.hw)
        assert np.array_equal(found.boxes, record.boxes)
        names = [source.class_names[label] for label in record.labels]
        assert [whole.class_names[label] for label in found.labels] == names
    assert whole.domains.tolist() == [0] * 12 + [1] * 4
    assert whole.subset([15, 0]).domains.tolist() == [1, 0]


def test_a_single_set_is_left_as_it_is(sets: list[ImageSet]):
    assert joined(sets[:1]) is sets[0]
    assert sets[0].domains is None


@pytest.mark.parametrize(
    ("names", "unique"),
    [(["a", "b"], ("a", "b")), (["a", "a", "a"], ("a", "a-2", "a-3")), (["a-2", "a", "a"], ("a-2", "a", "a-3"))],
)
def test_names_are_made_unique(names, unique):
    assert unique_names(names) == unique


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(0, 9))
def test_each_stretch_has_every_domains_share(domains, seed):
    domains, rng = np.array(domains), np.random.default_rng(seed)
    order = rng.permutation(len(domains))
    mixed = interleaved(order, domains, rng)
    assert sorted(mixed) == sorted(order)
    for domain in set(domains.tolist()):
        is_its = domains[mixed] == domain
        assert mixed[is_its].tolist() == order[domains[order] == domain].tolist()
        before = np.concatenate([[0], np.cumsum(is_its)])
        even = is_its.mean() * np.arange(len(domains) + 1)
        assert np.abs(before - even).max() <= len(set(domains.tolist()))  # an image of each domain at most


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 6))
def test_a_cut_by_domain_makes_mini_batches_of_one_domain_no_larger_than_asked(domains, parts):
    domains = tuple(sorted(domains))
    whole = Batch(
        images=torch.arange(len(domains)).view(-1, 1, 1, 1).float(),
        targets=Targets(
            boxes=torch.zeros(len(domains), 4),
            labels=torch.tensor(domains, dtype=torch.long),
            image_index=torch.arange(len(domains)),
            is_crowd=torch.zeros(len(domains), dtype=torch.bool),
        ),
        image_ids=tuple(range(len(domains))),
        paths=("",) * len(domains),
        placements=(None,) * len(domains),
        domains=domains,
    )
    cut = list(whole.split(parts, by_domain=True))
    assert [image for part in cut for image in part.image_ids] == list(range(len(domains)))
    assert all(len(set(part.domains)) == 1 and len(part) <= -(-len(domains) // parts) for part in cut)
    assert all(part.targets.labels.tolist() == list(part.domains) for part in cut)
    assert len(cut) < parts + max(len(set(domains)), 1)


def loader(whole: ImageSet, rank: int = 0, *, mosaic: float = 0.0, ranks: int = 1, **more: bool) -> TrainLoader:
    return make_train_loader(
        whole,
        InputSizes((32, 32)),
        batch_size=8,
        augment=AugmentOptions(mosaic=mosaic),
        seed=3,
        workers=0,
        cache="off",
        rank=rank,
        ranks=ranks,
        **more,
    )


def test_batches_tell_the_domain_of_each_image(sets: list[ImageSet]):
    whole = joined(sets)
    folders = {Path(whole[index].path).parents[1].name: domain for index, domain in enumerate(whole.domains.tolist())}
    for batch in loader(whole):
        assert [folders[Path(path).parents[1].name] for path in batch.paths] == list(batch.domains)
        assert sum(batch.domains) == 2  # a quarter of 8


def test_batches_sorted_by_domain_have_the_same_images(sets: list[ImageSet]):
    whole = joined(sets)
    for rank in (0, 1):
        for mixed, apart in zip(
            loader(whole, rank, ranks=2), loader(whole, rank, ranks=2, by_domain=True), strict=True
        ):
            assert [len(list(run)) for _, run in groupby(apart.domains)] == [3, 1]
            pixels = dict(zip(mixed.paths, mixed.images, strict=True))
            assert all(torch.equal(pixels[path], image) for path, image in zip(apart.paths, apart.images, strict=True))


def test_a_resumed_epoch_goes_on_with_the_same_batches(sets: list[ImageSet]):
    whole, resumed = loader(joined(sets), by_domain=True), loader(joined(sets), by_domain=True)
    whole.set_epoch(1)
    resumed.set_epoch(1, 1)
    assert [batch.paths for batch in whole][1:] == [batch.paths for batch in resumed]


@pytest.mark.parametrize("is_apart", [False, True])
def test_mosaics_join_images_of_one_domain_where_domains_are_kept_apart(sets: list[ImageSet], is_apart: bool):
    whole = loader(joined(sets), mosaic=1.0, is_apart=is_apart)
    joins = [{Path(path).parents[1] for path in paths.split(" + ")} for batch in whole for paths in batch.paths]
    assert max(map(len, joins)) == (1 if is_apart else 2)


def test_an_unreadable_image_is_replaced_by_one_of_its_domain(sets: list[ImageSet], tmp_path: Path):
    whole = joined(sets)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    paths = [str(broken) if index == 11 else path for index, path in enumerate(map(bytes.decode, whole.paths.tolist()))]
    damaged = replace(whole, paths=np.array([path.encode() for path in paths]))
    names = {path: domain for batch in loader(damaged) for path, domain in zip(batch.paths, batch.domains, strict=True)}
    assert {domain for path, domain in names.items() if Path(path).parents[1].name == "a"} == {0}
