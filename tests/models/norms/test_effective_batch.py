"""How many images a norm's statistics are of, and what is said about it before a training."""

from __future__ import annotations

import pytest

from cfg.plan import parse_plan
from models.norms.cmbn import CrossMiniBatchNormSpec
from models.norms.effective_batch import check_values, describe_norm, effective_images, norm_warnings
from models.norms.options import NormOptions, resolve_norm
from models.norms.table import NORMS
from utils.errors import UserError

CUT = {"mini_batch": 2, "subdivisions": 8}
WARNED = {**CUT, "from_scratch": False}


def options(norm: str, **settings: object) -> NormOptions:
    return resolve_norm(NormOptions(norm=norm, **settings))


@pytest.mark.parametrize(
    ("made", "images"),
    [
        (options("bn"), 2),
        (options("syncbn"), 2),
        (options("cmbn"), 16),
        (options("cmbn:gradient=darknet"), 16),
        (options("cbn"), 8),
        (options("cbn:window=10"), 20),
        (options("cbn-lite:window=0"), 16),
        (options("mabn:average_images=12"), 12),
        (options("brn"), 160),
        (options("brn", norm_momentum=0.0), 16_000),
        (options("ghost"), 2),
        (options("ghost:size=1"), 1),
        (options("bcn"), 160),
        (options("gn:ws"), None),
        (options("evonorm-s0"), None),
        (options("frn"), None),
        (options("gn"), None),
        (options("ln"), None),
        (options("in"), None),
        (options("frozen"), None),
        (options("none"), None),
        (options("cmbn", norm_eval=True), None),
    ],
)
def test_images_behind_the_statistics(made, images):
    assert effective_images(made, **CUT) == images


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (options("bn"), "bn: mini-batches of 2 images, statistics of 2"),
        (options("cmbn"), f"cmbn: mini-batches of 2 images, statistics of up to 16; {CrossMiniBatchNormSpec().remark}"),
        (options("cbn:gradient=share"), "cbn:gradient=share: mini-batches of 2 images, statistics of up to 8"),
        (options("gn"), "gn: mini-batches of 2 images, statistics of groups of channels of each image"),
        (options("bn", norm_eval=True), "bn: mini-batches of 2 images, running statistics, which stay"),
        (options("none"), "none: mini-batches of 2 images, nothing; a bias in place of the norm"),
    ],
)
def test_the_line_in_words(made, line):
    assert describe_norm(made, **CUT) == line


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_has_a_line(norm):
    assert describe_norm(options(norm), mini_batch=1, subdivisions=1).startswith(norm)


def test_few_images_are_warned_of_with_the_remedies():
    (line,) = norm_warnings(options("bn"), **WARNED)
    assert "bn normalizes by the statistics of 2 images, fewer than 8" in line
    assert "--norm cmbn pools the batch's 16" in line and "--norm cbn" in line and "--norm gn" in line
    (line,) = norm_warnings(options("syncbn"), mini_batch=4, subdivisions=1, from_scratch=False)
    assert "cmbn" not in line and "--norm cbn" in line  # a batch of one mini-batch has nothing to pool


def test_whoever_chose_the_norm_by_its_images_says_how_many_are_few():
    assert norm_warnings(options("bn"), mini_batch=4, subdivisions=2, from_scratch=False, few=4) == []
    (line,) = norm_warnings(options("bn"), mini_batch=3, subdivisions=2, from_scratch=False, few=4)
    assert "3 images, fewer than 4" in line


@pytest.mark.parametrize(
    "norm", [norm for norm, spec in NORMS.items() if not spec.has_batch_statistics or spec().pools]
)
def test_norms_that_look_further_are_not_warned_of(norm):
    assert norm_warnings(options(norm), **WARNED) == []


@pytest.mark.parametrize(
    ("norm", "remedy"), [("cmbn", "--norm cbn"), ("cbn", "a larger window"), ("cbn-lite", "window")]
)
def test_norms_that_pool_little_are_warned_of(norm, remedy):
    (line,) = norm_warnings(options(norm), mini_batch=1, subdivisions=4, from_scratch=False)
    assert "statistics of 4 images" in line and remedy in line and "cmbn pools" not in line


@pytest.mark.parametrize(
    "made", [options("frozen"), options("bn", norm_eval=True), options("cmbn", norm_freeze_after=0.0)]
)
def test_statistics_of_nothing_are_warned_of(made):
    (line,) = norm_warnings(made, mini_batch=1, subdivisions=1, from_scratch=True)
    assert "--weights" in line
    assert norm_warnings(made, mini_batch=1, subdivisions=1, from_scratch=False) == []


def test_enough_images_and_frozen_statistics_are_not_warned_of():
    assert norm_warnings(options("bn"), mini_batch=8, subdivisions=2, from_scratch=False) == []
    assert len(norm_warnings(options("bn"), mini_batch=7, subdivisions=2, from_scratch=False)) == 1
    assert norm_warnings(options("bn", norm_eval=True), **WARNED) == []


# --- one value per channel -----------------------------------------------------------------------------------

DEEP = """[net]
width=8
height=4
[convolutional]
batch_normalize=1
filters=4
size=3
stride=4
pad=1
activation=leaky
[convolutional]
filters=4
size=3
stride=2
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=4
size=1
activation=leaky
"""


def test_one_value_per_channel_names_layer_and_line():
    plan = parse_plan(DEEP, path="deep.cfg")
    with pytest.raises(UserError, match=r"^deep\.cfg:17: layer 2 has one value per channel .* at 4x8 px, and bn"):
        check_values(plan, options("bn"), mini_batch=1)
    assert DEEP.splitlines()[16] == "[convolutional]"


@pytest.mark.parametrize(
    ("norm", "mini_batch", "input_hw"),
    [("bn", 2, (4, 8)), ("bn", 1, (4, 16)), ("bn", 1, (16, 8)), ("syncbn", 2, (4, 4))],
)
def test_two_values_will_do(norm, mini_batch, input_hw):
    plan = parse_plan(DEEP, path="deep.cfg", input_hw=input_hw)
    assert check_values(plan, options(norm), mini_batch=mini_batch) is None


@pytest.mark.parametrize("norm", ["mabn", "ln", "frozen", "none"])
def test_norms_that_need_no_variance_of_a_mini_batch_can_do_with_one_value(norm):
    assert check_values(parse_plan(DEEP, path="deep.cfg"), options(norm), mini_batch=1) is None


@pytest.mark.parametrize(
    "norm", ["cmbn", "cbn", "cbn-lite", "brn", "syncbn", "ghost", "gn", "in", "bcn", "evonorm-s0", "frn"]
)
def test_pools_begin_with_one_mini_batch_and_groups_may_be_one_channel(norm):
    with pytest.raises(UserError, match="one value per channel"):
        check_values(parse_plan(DEEP, path="deep.cfg"), options(norm), mini_batch=1)


@pytest.mark.parametrize("norm", ["gn", "in", "evonorm-s0", "frn"])
def test_norms_of_single_images_are_not_helped_by_more_of_them(norm):
    with pytest.raises(UserError, match=r"one value per channel.* take a larger --image-size or --norm ln"):
        check_values(parse_plan(DEEP, path="deep.cfg"), options(norm), mini_batch=16)


def test_a_group_of_two_channels_has_two_values():
    plan = parse_plan(DEEP, path="deep.cfg")
    assert check_values(plan, options("gn:groups=1"), mini_batch=1) is None


@pytest.mark.parametrize("held", [{"norm_eval": True}, {"norm_freeze_after": 0.0}])
def test_frozen_statistics_can_do_with_one_value(held):
    assert check_values(parse_plan(DEEP, path="deep.cfg"), options("bn", **held), mini_batch=1) is None
