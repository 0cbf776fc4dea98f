import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.balance import balance_in_words, balanced_order, image_shares, images_at
from data.image_set import ImageSet, Record, pack
from data.problems import Problems


def image_set(*labels: list[int], crowds: set[int] = frozenset()) -> ImageSet:
    """An image for each list of labels; those of `crowds` show crowd regions only."""
    records = [
        Record(
            path=f"{number}.png",
            image_id=number,
            boxes=np.tile(np.array([2, 2, 30, 30], np.float32), (len(each), 1)),
            labels=np.array(each, np.int64),
            is_crowd=np.full(len(each), number in crowds),
            hw=(40, 40),
            places=[""] * len(each),
        )
        for number, each in enumerate(labels)
    ]
    names = {"class_names": ("cat", "dog", "owl"), "category_ids": (1, 2, 3)}
    return pack(records, name="set", split="train", problems=Problems(), source="", **names)


def test_an_image_counts_as_its_rarest_class() -> None:
    """cat in 8 of 12 images, dog in 2, owl in none; one image is empty, and one shows a crowd of owls."""
    made = image_set(*[[0, 0]] * 7, [0, 1], [1, 1, 1], [], [2], [0], crowds={10, 11})
    shares = image_shares(made)
    np.testing.assert_allclose(shares, np.array([1] * 7 + [2, 2, 1, 1, 1]) / 14)
    words = "dog, the rarest class, is in 28.6 % of an epoch's images instead of 16.7 %"
    assert balance_in_words(made, shares) == words


@pytest.mark.parametrize("labels", [[[], []], [[0], [0], [0]], [[0, 1], [1, 0]]])
def test_nothing_to_balance_changes_no_share(labels: list[list[int]]) -> None:
    made = image_set(*labels)
    np.testing.assert_allclose(image_shares(made), 1 / len(labels))
    assert balance_in_words(made, image_shares(made))


@settings(deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=30), seed=st.integers(0, 2**32))
def test_an_epoch_holds_of_each_image_its_share_rounded(weights: list[float], seed: int) -> None:
    shares = np.array(weights) / np.sum(weights)
    order = balanced_order(shares, np.random.default_rng(seed))
    assert len(order) == len(shares)
    counts, expected = np.bincount(order, minlength=len(shares)), len(shares) * shares
    assert (np.abs(counts - expected) < 1 + 1e-9).all()
    np.testing.assert_array_equal(order, balanced_order(shares, np.random.default_rng(seed)))


def test_over_many_epochs_each_image_has_its_share_at_any_place() -> None:
    shares = np.array([1, 2, 3, 4, 10]) / 20
    orders = np.array([balanced_order(shares, np.random.default_rng(seed)) for seed in range(4000)])
    for place in range(5):
        np.testing.assert_allclose(np.bincount(orders[:, place]) / 4000, shares, atol=0.03)


def test_the_ends_of_the_shares_belong_to_images() -> None:
    ends = np.cumsum([0.25, 0.5, 0.25])
    assert images_at(np.array([0, 0.2, 0.25, 0.7, 0.75, 1 - 1e-16, 1]), ends).tolist() == [0, 0, 1, 1, 2, 2, 2]
