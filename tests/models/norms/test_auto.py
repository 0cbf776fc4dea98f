"""`--norm auto`: which norm, for how many images, and what may be said besides."""

from __future__ import annotations

import pytest

from models.norms.auto import choose_norm, enough_images
from models.norms.options import NormOptions, resolve_norm

AUTO = NormOptions(norm="auto")
ENOUGH = enough_images(from_weights=False)


@pytest.mark.parametrize("mini_batch", [1, 2, 3])
def test_few_images_get_cmbn_with_carry(mini_batch):
    norm, why = choose_norm(AUTO, mini_batch=mini_batch, forwards=2, from_weights=False)
    assert norm == resolve_norm(NormOptions(norm="cmbn:carry"))
    images = "1 image in a forward is" if mini_batch == 1 else f"{mini_batch} images in a forward are"
    assert why == f"cmbn:carry, because {images} fewer than {ENOUGH}"


def test_a_batch_of_one_small_forward_gets_cbn_which_pools_earlier_batches():
    norm, why = choose_norm(AUTO, mini_batch=2, forwards=1, from_weights=False)
    assert norm == resolve_norm(NormOptions(norm="cbn")) and norm.spec.pools
    assert why == f"cbn, because 2 images in a forward are fewer than {ENOUGH}, and a batch has no other forward"


def test_from_weights_two_images_are_enough():
    assert choose_norm(AUTO, mini_batch=2, forwards=8, from_weights=True)[0].norm == "bn"
    norm, why = choose_norm(AUTO, mini_batch=1, forwards=16, from_weights=True)
    assert norm.norm == "cmbn:carry" and why == "cmbn:carry, because 1 image in a forward is fewer than 2"


def test_many_images_get_batch_norm():
    norm, why = choose_norm(AUTO, mini_batch=ENOUGH, forwards=1, from_weights=False)
    assert norm == resolve_norm(NormOptions(norm="bn"))
    assert why == "bn, because 4 images in a forward are enough for it"


@pytest.mark.parametrize("mini_batch", [1, 16])
def test_what_was_said_besides_stays(mini_batch):
    said = NormOptions(norm="auto", weight_centralization=True, norm_eps=1e-3, precise_bn=64, norm_freeze_after=0.7)
    norm, _ = choose_norm(said, mini_batch=mini_batch, forwards=2, from_weights=False)
    assert (norm.weight_centralization, norm.norm_eps, norm.precise_bn, norm.norm_freeze_after) == (True, 1e-3, 64, 0.7)


def test_a_norm_that_was_named_is_what_it_is():
    assert choose_norm(NormOptions(norm="gn"), mini_batch=1, forwards=2, from_weights=False) == (
        resolve_norm(NormOptions(norm="gn")),
        "",
    )
