"""The norms by name: what is refused, what is filled in, and the two options that every norm shares."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest
import torch
from torch import nn

from models.blocks import ConvNormAct
from models.norms.batch_stat import BatchStatNorm
from models.norms.cbn import CBN_GRADIENTS, ESTIMATORS
from models.norms.cmbn import DarknetCrossMiniBatchNorm
from models.norms.table import (
    CMBN_GRADIENTS,
    NORMS,
    NormOptions,
    largest_divisor,
    norm_factory,
    norm_of_weights,
    resolve_norm,
)
from models.norms.weight_centralization import CentralizedConv2d
from tests.models.norms.kinds import KINDS, block, parts, run_batch
from utils.clock import BatchClock
from utils.errors import UserError

# --- the table of kinds that the other tests run over ---------------------------------------------------------


def test_every_norm_is_among_the_kinds():
    assert {options.norm for options in KINDS.values()} == set(NORMS)


def test_every_gradient_and_estimator_is_among_the_kinds():
    resolved = [resolve_norm(options) for options in KINDS.values()]
    seen = {(o.norm, o.norm_gradient, o.norm_estimator) for o in resolved if o.norm_gradient is not None}
    cmbn = {("cmbn", gradient, None) for gradient in CMBN_GRADIENTS}
    cbn = {("cbn", g, e) for g in CBN_GRADIENTS for e in ESTIMATORS if (g, e) != ("weights", "none")}
    lite = {("cbn-lite", gradient, None) for gradient in CBN_GRADIENTS if gradient != "weights"}
    assert seen == cmbn | cbn | lite


def test_every_knob_is_turned_by_some_kind():
    resolved = [resolve_norm(options) for options in KINDS.values()]
    unturned = [
        field.name
        for field in fields(NormOptions)
        if all(
            getattr(options, field.name) == getattr(resolve_norm(_bare(options)), field.name) for options in resolved
        )
    ]
    # The first two are what `_bare` keeps; the test above has them.
    assert set(unturned) == {"norm", "norm_gradient", *OF_THE_TRAINING}


def _bare(options: NormOptions) -> NormOptions:
    """The same norm with its defaults."""
    return NormOptions(norm=options.norm, norm_gradient=options.norm_gradient)


def test_no_two_kinds_are_one():
    resolved = [resolve_norm(options) for options in KINDS.values()]
    assert len(set(resolved)) == len(resolved)


# --- refusals ------------------------------------------------------------------------------------------------

VALUES = {
    "norm_gradient": "share",
    "norm_carry": True,
    "norm_window": 4,
    "norm_estimator": "std",
    "norm_burn_in_steps": 5,
    "norm_growth_steps": 5,
    "norm_refresh_steps": 5,
    "norm_positions": 5,
    "norm_average_images": 5.0,
    "norm_r_max": 2.0,
    "norm_d_max": 2.0,
    "norm_ramp_steps": 5,
    "norm_groups": 4,
    "norm_running": "pooled",
    "norm_sync": True,
    "norm_momentum": 0.2,
    "norm_eval": True,
    "norm_freeze_after": 0.8,
    "precise_bn": 100,
}
# Read by the training, and the same layers with any value.
# Read by cmbn, too, with its gradient `weights`, and not with the `share` that is asked for below.
OF_WEIGHTS = {"norm_carry", "norm_burn_in_steps", "norm_positions"}
OF_THE_TRAINING = {"norm_eval", "norm_freeze_after", "precise_bn"}
CBNS = {"cbn", "cbn-lite"}
BY_BATCHES = {"bn", "cmbn", *CBNS, "mabn", "brn", "syncbn"}
READERS = {
    "norm_gradient": {"cmbn", *CBNS},
    "norm_carry": set(),
    "norm_window": CBNS,
    "norm_estimator": {"cbn"},
    "norm_burn_in_steps": {*CBNS, "brn"},
    "norm_growth_steps": CBNS,
    "norm_refresh_steps": {"cbn-lite"},
    "norm_positions": CBNS,
    "norm_average_images": {"mabn"},
    "norm_r_max": {"brn"},
    "norm_d_max": {"brn"},
    "norm_ramp_steps": {"brn"},
    "norm_groups": {"gn"},
    "norm_running": {"bn"},
    "norm_sync": {"cmbn", *CBNS},
    "norm_momentum": BY_BATCHES,
    "norm_eval": BY_BATCHES,
    "norm_freeze_after": BY_BATCHES,
    "precise_bn": {*BY_BATCHES, "frozen"},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("knob", VALUES)
def test_a_knob_is_read_or_refused(norm, knob):
    """By name and all: nothing given is ignored."""
    gradient = {"norm_gradient": "share"} if norm == "cmbn" else {}
    options = NormOptions(norm=norm, **{**gradient, knob: VALUES[knob]})
    if norm in READERS[knob]:
        assert getattr(resolve_norm(options), knob) == VALUES[knob]
    else:
        flag = "--" + knob.replace("_", "-")
        with pytest.raises(UserError, match=f"^{flag} is read by .*, not by --norm {norm}"):
            resolve_norm(options)


def test_the_knobs_above_are_all_there_are():
    for_all = {"norm", "norm_eps", "weight_centralization", "norm_freeze_affine"}
    assert VALUES.keys() == READERS.keys() == {field.name for field in fields(NormOptions)} - for_all


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batch"}, "unknown norm 'batch': choose one of bn, cmbn"),
        ({"norm": "cbn", "norm_gradient": "darknet"}, "--norm-gradient of cbn is one of share, weights, renorm"),
        ({"norm": "cbn-lite", "norm_gradient": "darknet"}, "--norm-gradient of cbn-lite is one of share"),
        ({"norm": "cbn-lite", "norm_gradient": "weights"}, "every mini-batch's own covariance: use --norm cbn"),
        (
            {"norm": "cbn", "norm_gradient": "weights", "norm_estimator": "none"},
            "follows the compensation, which --norm-estimator none leaves out",
        ),
        ({"norm_eval": True, "norm_freeze_after": 0.5}, "--norm-eval .* --norm-freeze-after has nothing to add"),
        (
            {"norm": "cmbn", "norm_gradient": "share", "norm_positions": 8},
            "--norm-positions .* not by --norm cmbn --norm-gradient share",
        ),
        (
            {"norm": "cmbn", "norm_gradient": "renorm", "norm_sync": True},
            "--norm-sync .* not by --norm cmbn --norm-gradient renorm",
        ),
        (
            {"norm": "cmbn", "norm_gradient": "darknet", "norm_sync": False},
            "--norm-sync .* not by --norm cmbn --norm-gradient darknet",
        ),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        norm_factory(NormOptions(**settings))


# --- what is filled in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_resolved_resolves_to_itself(kind):
    """A checkpoint's settings name every knob."""
    once = resolve_norm(KINDS[kind])
    assert resolve_norm(once) == once


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_given_stays(kind):
    given = KINDS[kind]
    resolved = resolve_norm(given)
    for field in fields(NormOptions):
        if getattr(given, field.name) is not None:
            assert getattr(resolved, field.name) == getattr(given, field.name)


@pytest.mark.parametrize("norm", NORMS)
def test_every_knob_a_norm_reads_gets_a_value(norm):
    resolved = resolve_norm(NormOptions(norm=norm))
    gradient = resolved.norm_gradient
    for knob, readers in READERS.items():
        reads = norm in readers or (knob in OF_WEIGHTS and (norm, gradient) == ("cmbn", "weights"))
        assert (getattr(resolved, knob) is not None) == reads, knob


def test_a_carried_cmbn_burns_in_as_cbn_does():
    resolved = [resolve_norm(NormOptions(norm="cmbn", norm_carry=carry)) for carry in (None, True)]
    assert [options.norm_burn_in_steps for options in resolved] == [0, 100]
    assert resolve_norm(NormOptions(norm="cmbn", norm_carry=True, norm_burn_in_steps=0)).norm_burn_in_steps == 0


@pytest.mark.parametrize(("estimator", "gradient"), [(None, "weights"), ("taylor", "weights"), ("none", "share")])
def test_cbns_gradient_reaches_the_weights_through_what_is_compensated(estimator, gradient):
    assert resolve_norm(NormOptions(norm="cbn", norm_estimator=estimator)).norm_gradient == gradient


def test_darknets_cmbn_has_darknets_rate():
    assert resolve_norm(NormOptions(norm="cmbn", norm_gradient="darknet")).norm_momentum == 0.01
    assert resolve_norm(NormOptions(norm="cmbn")).norm_momentum == 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_gets_the_rates(kind):
    if kind == "none":
        return
    options = replace(KINDS[kind], norm_eps=1e-4)
    norm = norm_factory(options)(nn.Conv2d(4, 8, 3))
    assert norm.eps == 1e-4
    if isinstance(norm, BatchStatNorm | nn.BatchNorm2d) and kind != "frozen":
        assert norm.momentum == resolve_norm(options).norm_momentum


def test_groups_fall_back_to_a_divisor():
    assert [largest_divisor(n, at_most=32) for n in (64, 255, 30, 1)] == [32, 17, 30, 1]
    assert norm_factory(NormOptions(norm="gn"))(nn.Conv2d(3, 255, 1)).num_groups == 17
    assert norm_factory(NormOptions(norm="ln"))(nn.Conv2d(3, 255, 1)).num_groups == 1
    assert norm_factory(NormOptions(norm="in"))(nn.Conv2d(3, 255, 1)).num_groups == 255


def test_an_epsilon_is_used_in_training_and_evaluation():
    for kind in KINDS:
        if kind == "none":
            continue
        small, large = (block(replace(KINDS[kind], norm_eps=eps)) for eps in (1e-5, 1e-1))
        for module in (small, large):
            module.outputs = run_batch(module, BatchClock(module), parts())
        assert not torch.allclose(small.outputs[0], large.outputs[0]), kind
        assert not torch.allclose(small.eval()(parts()[0]), large.eval()(parts()[0])), kind


# --- options of every norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_of_a_block_gets_a_gradient(norm):
    made = ConvNormAct.make(4, 8, 3, norm=norm_factory(NormOptions(norm=norm)), activation=nn.Mish())
    assert (made.conv.bias is not None) == (norm == "none")
    made(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "none"])
def test_a_frozen_affine_part_stays_as_it_starts(norm):
    made = ConvNormAct.make(
        4, 8, 3, norm=norm_factory(NormOptions(norm=norm, norm_freeze_affine=True)), activation=nn.Mish()
    )
    for x in BatchClock(made).minibatches(parts(dtype=torch.float32)):
        made(x).square().sum().backward()
    assert made.conv.weight.grad.abs().sum() > 0
    assert [p.requires_grad for p in made.norm.parameters()] == [False, False]
    assert [p.grad for p in made.norm.parameters()] == [None, None]
    assert made.norm.weight.tolist() == [1] * 8 and made.norm.bias.tolist() == [0] * 8


@pytest.mark.parametrize("given", [{"norm_eps": 1e-3}, {"norm_freeze_affine": True}, {"weight_centralization": True}])
def test_no_norm_refuses_what_is_about_one(given):
    with pytest.raises(UserError, match="is about a norm"):
        resolve_norm(NormOptions(norm="none", **given))


@pytest.mark.parametrize("trained", ["mabn", "bn", "gn", "cbn"])
def test_weights_bring_along_what_makes_them_the_same_function(trained):
    """Else they would be loaded without a word into a network that computes something else."""
    own = {"norm_groups": 2} if trained == "gn" else {"weight_centralization": True, "norm_eps": 1e-3}
    stored = asdict(resolve_norm(NormOptions(norm=trained, **own)))
    again = NormOptions(**norm_of_weights(stored, None))
    assert asdict(resolve_norm(again)) == stored
    other = norm_of_weights(stored, "cmbn")
    assert other == {"weight_centralization": stored["weight_centralization"], "norm_eps": stored["norm_eps"]}
    assert norm_of_weights(stored, "none") == {}


def test_another_gradient_goes_on_with_the_weights():
    """What only the first gradient reads must not be refused in the name of a user who never typed it."""
    stored = asdict(resolve_norm(NormOptions(norm="cmbn")))
    assert resolve_norm(NormOptions(**norm_of_weights(stored, None), norm_gradient="share")).norm_gradient == "share"


def test_how_a_training_treats_statistics_is_not_the_weights_business():
    stored = asdict(resolve_norm(NormOptions(norm="bn", norm_eval=True, precise_bn=8, norm_freeze_after=1.0)))
    resolved = resolve_norm(NormOptions(**norm_of_weights(stored, "bn")))
    assert (resolved.norm_eval, resolved.precise_bn, resolved.norm_freeze_after) == (False, 0, 1.0)


def test_darknets_variant_is_of_no_other_gradient():
    kinds = [kind for kind in KINDS if isinstance(block(kind).norm, DarknetCrossMiniBatchNorm)]
    assert kinds == ["cmbn-darknet"]


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "none"])
def test_filters_are_centred_where_asked_for_and_with_mabn(norm):
    for asked in (None, True, False):
        options = NormOptions(norm=norm, weight_centralization=asked)
        made = ConvNormAct.make(4, 8, 3, norm=norm_factory(options), activation=nn.Identity())
        assert isinstance(made.conv, CentralizedConv2d) == (norm == "mabn" if asked is None else asked)
