"""The norms by name: what can be typed, what is refused, what is filled in, and the options that every norm shares."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace

import pytest
import torch
from torch import nn

from cfg.plan import load_plan
from models.blocks import ConvNormAct
from models.norms.batch_stat import BatchStatNorm
from models.norms.cmbn import DarknetCrossMiniBatchNorm
from models.norms.effective_batch import describe_norm, norm_warnings
from models.norms.factory import norm_factory
from models.norms.group_norm import largest_divisor
from models.norms.old_spelling import removed_flags, respelled
from models.norms.options import NormOptions, norm_of_weights, resolve_norm, stored_norm
from models.norms.spec import NormSpec, own_fields
from models.norms.table import NORMS, checked_norm, parse_norm
from models.norms.used_weight import CentralizedConv2d, StandardizedConv2d
from tests.models.norms.kinds import KINDS, block, parts, run_batch
from utils.clock import BatchClock
from utils.errors import UserError
from utils.knob import knob

# --- the table of kinds that the other tests run over ---------------------------------------------------------


def test_every_norm_is_among_the_kinds():
    assert {options.spec.name for options in KINDS.values()} == set(NORMS)


@pytest.mark.parametrize("norm", NORMS)
def test_every_option_is_tried_by_some_kind_or_at_its_default(norm):
    """Each choice of an option with choices, and another value than the default of any other option."""
    specs = [options.spec for options in KINDS.values() if options.spec.name == norm]
    for f in own_fields(NORMS[norm]):
        tried = {getattr(spec, f.name) for spec in specs}
        if (norm, f.name) == ("cbn-lite", "sync"):  # tests/models/norms/test_ranks.py
            continue
        assert tried | {f.default} >= set(f.metadata["choices"] or ())
        assert tried - {f.default}, f.name


@pytest.mark.parametrize("norm", NORMS)
def test_no_option_hides_what_a_spec_says_itself(norm):
    assert {f.name for f in own_fields(NORMS[norm])} & (set(dir(NormSpec)) | {"name", "summary", "source"}) == set()


def test_no_two_kinds_are_one():
    resolved = [resolve_norm(options) for options in KINDS.values()]
    assert len(set(resolved)) == len(resolved)


# --- a new norm ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSpec(NormSpec):
    """A norm as its own file would define it: it multiplies by a constant."""

    name = "scale"
    summary = "a constant"
    source = "this test"
    has_batch_statistics = False
    has_running_statistics = False

    factor: float = knob(2.0, "what outputs are multiplied by", low=0)

    def make(self, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        layer = nn.Conv2d(conv.out_channels, conv.out_channels, 1, groups=conv.out_channels)
        nn.init.constant_(layer.weight, self.factor)
        nn.init.zeros_(layer.bias)
        return layer


def test_a_norm_is_one_file_and_one_line(monkeypatch, capsys):
    """Typed, described, built, stored and read again by nothing but its entry in the table."""
    monkeypatch.setitem(NORMS, ScaleSpec.name, ScaleSpec)  # the line
    options = resolve_norm(NormOptions(norm=checked_norm("scale:factor=3")))
    assert options.norm == "scale:factor=3" and stored_norm(asdict(options)) == options
    made = ConvNormAct.make(4, 8, 3, norm=norm_factory(options), activation=nn.Identity())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(made(x), 3 * made.conv(x))
    assert (
        describe_norm(options, mini_batch=2, subdivisions=4) == "scale:factor=3: mini-batches of 2 images, a constant"
    )
    assert norm_warnings(options, mini_batch=1, subdivisions=1, from_scratch=True) == []
    with pytest.raises(SystemExit) as caught:
        checked_norm("help")
    assert caught.value.code == 0 and "scale     a constant\n          this test\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="scale: factor=-1 must be"):
        checked_norm("scale:factor=-1")


# --- what is typed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_is_read_back_from_its_spelling(kind):
    spec = KINDS[kind].spec
    assert parse_norm(str(spec)) == spec


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("cmbn", "cmbn"),
        ("cmbn:gradient=weights,carry=off", "cmbn"),
        ("cmbn: carry , burn-in-steps=5", "cmbn:carry,burn_in_steps=5"),
        ("cmbn:carry=on,gradient=weights", "cmbn:carry"),
        ("gn:groups=32", "gn"),
        ("mabn:average_images=8", "mabn:average_images=8"),
        ("mabn:average_images=2.5", "mabn:average_images=2.5"),
        ("mabn:average_images=16.123456789", "mabn:average_images=16.123456789"),
        ("cbn:window=8,estimator=taylor", "cbn:estimator=taylor,window=8"),
        ("gn:ws", "gn:ws"),
        ("cmbn:ws,carry", "cmbn:carry,ws"),
        ("bn:ws=off", "bn"),
    ],
)
def test_a_norm_has_one_canonical_spelling(typed, canonical):
    assert str(parse_norm(typed)) == canonical
    assert resolve_norm(NormOptions(norm=checked_norm(typed))).norm == canonical


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("batch", "unknown norm 'batch': choose one of bn, .*auto; --norm help"),
        ("", "unknown norm ''"),
        (
            "gn:window=2",
            "--norm gn has no option 'window'\n\ngn  .*\n.*Group Normal.*\n.*groups (.|\n)*default 32",
        ),
        ("ln:groups=2", "--norm ln has no option 'groups'"),
        ("gn:", "--norm gn:: an option is missing after : or ,"),
        ("cmbn:carry,", "an option is missing"),
        ("cmbn:carry,carry=off", "--norm cmbn:carry,carry=off: carry is given twice"),
        ("auto:carry", "--norm auto has no options"),
        ("gn:groups", "--norm gn: groups needs a whole number"),
        ("gn:groups=0", "--norm gn: groups=0 must be at least 1"),
        ("gn:groups=2.5", "--norm gn: groups=2.5 needs a whole number"),
        ("mabn:average_images=nan", "average_images=nan must be"),
        ("cmbn:carry=maybe", "carry=maybe must be on or off"),
        ("cbn:gradient=darknet", "--norm cbn: gradient=darknet must be one of weights, share, renorm"),
        ("cbn-lite:gradient=weights", "must be one of share, renorm"),
        ("cbn:estimator=none", "write cbn:estimator=none,gradient=share"),
        ("cmbn:gradient=share,positions=8", "--norm cmbn:gradient=share does not use positions"),
        ("cmbn:gradient=darknet,carry,burn_in_steps=0", "does not use carry and burn_in_steps"),
        ("none:ws", "--norm none has no option ws: .* need a norm that restores the scale"),
        ("gn:ws=2", "--norm gn: ws=2 must be on or off"),
        ("cmbn:gradient=renorm,sync", "--norm cmbn:gradient=renorm does not use sync"),
    ],
)
def test_what_is_no_norm_is_refused(typed, message):
    with pytest.raises(UserError, match=message):
        checked_norm(typed)


OF_STATISTICS = {"norm_momentum": 0.2, "norm_eval": True, "norm_freeze_after": 0.8, "precise_bn": 100}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("setting", OF_STATISTICS)
def test_a_setting_about_statistics_is_used_or_refused(norm, setting):
    options = NormOptions(norm=norm, **{setting: OF_STATISTICS[setting]})
    spec = NORMS[norm]
    if spec.has_batch_statistics or (spec.has_running_statistics and setting == "precise_bn"):
        assert getattr(resolve_norm(options), setting) == OF_STATISTICS[setting]
    else:
        with pytest.raises(UserError, match=f"^--{setting.replace('_', '-')} is for norms with .* --norm {norm} does"):
            resolve_norm(options)


@pytest.mark.parametrize("norm", ["syncbn", "cmbn:sync", "cbn:sync", "gn", "none", "frozen"])
def test_shuffling_images_is_refused_where_a_rank_has_no_batch_statistics_of_its_own(norm):
    with pytest.raises(UserError, match=f"^--shuffle-bn .* --norm {norm}"):
        resolve_norm(NormOptions(norm=norm, shuffle_bn=True))
    assert not resolve_norm(NormOptions(norm=norm)).shuffle_bn


@pytest.mark.parametrize("norm", ["bn", "cmbn", "cbn", "mabn", "brn", "auto"])
def test_shuffling_images_is_off_unless_typed(norm):
    assert resolve_norm(NormOptions(norm=norm, shuffle_bn=True)).shuffle_bn
    assert resolve_norm(NormOptions(norm=norm)).shuffle_bn is False


def test_a_freeze_after_a_freeze_is_refused():
    with pytest.raises(UserError, match=r"--norm-eval .* --norm-freeze-after has nothing to add"):
        resolve_norm(NormOptions(norm_eval=True, norm_freeze_after=0.5))


@pytest.mark.parametrize("norm", ["gn:ws", "mabn:ws"])
def test_filters_that_are_standardized_are_not_centralized_as_well(norm):
    assert resolve_norm(NormOptions(norm=norm)).weight_centralization is False
    with pytest.raises(UserError, match=f"--weight-centralization adds nothing to {norm}"):
        resolve_norm(NormOptions(norm=norm, weight_centralization=True))


# --- what is filled in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_resolved_resolves_to_itself(kind):
    """A checkpoint names every setting."""
    once = resolve_norm(KINDS[kind])
    assert resolve_norm(once) == once


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_given_stays(kind):
    given = KINDS[kind]
    resolved = resolve_norm(given)
    assert resolved.spec == given.spec
    for field in fields(NormOptions):
        if field.name != "norm" and getattr(given, field.name) is not None:
            assert getattr(resolved, field.name) == getattr(given, field.name)


def test_a_carried_cmbn_burns_in_as_cbn_does():
    typed = ("cmbn", "cmbn:carry", "cmbn:carry,burn_in_steps=0", "cbn")
    assert [parse_norm(text).burn_in for text in typed] == [0, 100, 0, 100]


def test_darknets_cmbn_has_darknets_rate():
    assert resolve_norm(NormOptions(norm="cmbn:gradient=darknet")).norm_momentum == 0.01
    assert resolve_norm(NormOptions(norm="cmbn")).norm_momentum == 0.1


def test_gradients_that_are_ours_say_so_at_the_start():
    cut = {"mini_batch": 2, "subdivisions": 8}
    line = describe_norm(resolve_norm(NormOptions(norm="cmbn")), **cut)
    assert "(ours; the published one, darknet's, is cmbn:gradient=darknet, autograd's is cmbn:gradient=share)" in line
    assert "ours" in describe_norm(resolve_norm(NormOptions(norm="cbn")), **cut)
    for theirs in ("cmbn:gradient=darknet", "cbn:gradient=share", "bn", "gn"):
        assert "ours" not in describe_norm(resolve_norm(NormOptions(norm=theirs)), **cut)


# --- earlier spellings ---------------------------------------------------------------------------------------

COMMON = {"norm_eps": 1e-5, "norm_momentum": 0.1, "precise_bn": 0}


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ({"norm": "bn", "norm_running": "ema"}, "bn"),
        ({"norm": "bn", "norm_running": "pooled"}, "bn:running=pooled"),
        ({"norm": "cmbn", "norm_gradient": "weights", "norm_positions": 256, "norm_sync": False}, "cmbn"),
        ({"norm": "cmbn", "norm_gradient": "share", "norm_sync": True}, "cmbn:gradient=share,sync"),
        ({"norm": "cmbn", "norm_gradient": "weights", "norm_carry": True, "norm_burn_in_steps": 100}, "cmbn:carry"),
        ({"norm": "cmbn", "norm_carry": True, "norm_burn_in_steps": 51}, "cmbn:carry,burn_in_steps=51"),
        ({"norm": "cmbn", "norm_carry": False, "norm_burn_in_steps": 0}, "cmbn"),
        ({"norm": "cbn", "norm_estimator": "none", "norm_gradient": "share"}, "cbn:gradient=share,estimator=none"),
        (
            {"norm": "cbn", "norm_window": 0, "norm_growth_steps": 0, "norm_burn_in_steps": 100},
            "cbn:window=0,burn_in_steps=100",
        ),
        ({"norm": "mabn", "norm_average_images": 8.0}, "mabn:average_images=8"),
        ({"norm": "gn", "norm_groups": 8, "norm_momentum": None, "precise_bn": None}, "gn:groups=8"),
    ],
)
def test_earlier_checkpoints_are_read(stored, now):
    assert stored_norm({**({} if "norm_momentum" in stored else COMMON), **stored}).norm == now
    assert respelled(respelled(stored)) == respelled(stored)


def test_every_earlier_flag_has_an_answer_that_can_be_typed():
    assert len(removed_flags()) == 15
    for flag, sentence in removed_flags().items():
        assert flag.startswith("--norm-")
        for typed in re.findall(r"[a-z-]+:[a-z_]+[=\w]*", sentence):
            parse_norm(typed)


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
    (made(torch.randn(2, 4, 6, 6)) - 1).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "none"])
def test_a_frozen_affine_part_stays_as_it_starts(norm):
    made = ConvNormAct.make(
        4, 8, 3, norm=norm_factory(NormOptions(norm=norm, norm_freeze_affine=True)), activation=nn.Mish()
    )
    for x in BatchClock(made).minibatches(parts(dtype=torch.float32)):
        made(x).square().sum().backward()
    assert made.conv.weight.grad.abs().sum() > 0
    for name, parameter in made.norm.named_parameters():
        if name not in ("v", "tau"):  # of an activation
            assert not parameter.requires_grad and parameter.grad is None
    assert made.norm.weight.tolist() == [1] * 8 and made.norm.bias.tolist() == [0] * 8


@pytest.mark.parametrize("given", [{"norm_eps": 1e-3}, {"norm_freeze_affine": True}, {"weight_centralization": True}])
def test_no_norm_refuses_what_is_about_one(given):
    with pytest.raises(UserError, match="is about a norm"):
        resolve_norm(NormOptions(norm="none", **given))


@pytest.mark.parametrize("trained", ["mabn", "bn", "gn:groups=2", "cbn"])
def test_weights_bring_along_what_makes_them_the_same_function(trained):
    """Else they would be loaded without a word into a network that computes something else."""
    own = {} if trained.startswith("gn") else {"weight_centralization": True, "norm_eps": 1e-3}
    stored = asdict(resolve_norm(NormOptions(norm=trained, **own)))
    again = NormOptions(**norm_of_weights(stored, None))
    assert asdict(resolve_norm(again)) == stored
    other = norm_of_weights(stored, "cmbn")
    assert other == {"norm": "cmbn", **{name: stored[name] for name in ("weight_centralization", "norm_eps")}}
    assert norm_of_weights(stored, "none") == {"norm": "none"}
    assert norm_of_weights(stored, "auto")["norm"] == "auto"


@pytest.mark.parametrize("stored", [{"zzz": 1}, {"norm_carry": True}, {"norm": None, "norm_carry": True}, {"norm": 3}])
def test_a_norm_entry_of_another_making_is_the_users_error(stored):
    with pytest.raises(UserError, match=r"norm settings .* are not understood|norm is of type int"):
        norm_of_weights(stored, None)


def test_weights_bring_their_groups_unless_others_are_typed():
    stored = asdict(resolve_norm(NormOptions(norm="gn:groups=2")))
    assert norm_of_weights(stored, "gn")["norm"] == "gn:groups=2"
    assert norm_of_weights(stored, "gn:groups=4")["norm"] == "gn:groups=4"
    assert norm_of_weights(stored, "gn:groups=32")["norm"] == "gn"  # its default, typed


@pytest.mark.parametrize(
    ("trained", "typed", "now"),
    [
        ("gn:ws", None, "gn:ws"),
        ("gn:ws", "gn", "gn:ws"),
        ("gn:ws", "cmbn:carry", "cmbn:carry,ws"),
        ("gn:ws", "cmbn:ws=off", "cmbn"),
        ("bn", "gn:ws", "gn:ws"),
        ("mabn", "mabn:ws", "mabn:ws"),
        ("gn:ws", "none", "none"),
        ("bcn:groups=4,ws", "bcn", "bcn:groups=4,ws"),
        ("evonorm-s0:groups=4", "evonorm-s0", "evonorm-s0:groups=4"),
    ],
)
def test_weights_bring_their_standardized_filters_along(trained, typed, now):
    stored = asdict(resolve_norm(NormOptions(norm=trained)))
    assert resolve_norm(NormOptions(**norm_of_weights(stored, typed))).norm == now


def test_how_statistics_are_pooled_is_not_fixed_by_the_weights():
    stored = asdict(resolve_norm(NormOptions(norm="cmbn:carry,positions=9")))
    assert norm_of_weights(stored, None)["norm"] == "cmbn"
    assert norm_of_weights(stored, "cmbn:gradient=share")["norm"] == "cmbn:gradient=share"


def test_how_a_training_treats_statistics_is_not_the_weights_business():
    stored = asdict(resolve_norm(NormOptions(norm="bn", norm_eval=True, precise_bn=8, norm_freeze_after=1.0)))
    resolved = resolve_norm(NormOptions(**norm_of_weights(stored, "bn")))
    assert (resolved.norm_eval, resolved.precise_bn, resolved.norm_freeze_after) == (False, 0, 1.0)


def test_darknets_variant_is_of_no_other_gradient():
    kinds = [kind for kind in KINDS if isinstance(block(kind).norm, DarknetCrossMiniBatchNorm)]
    assert kinds == ["cmbn-darknet"]


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "none"])
def test_every_norm_standardizes_filters_where_asked(norm):
    made = ConvNormAct.make(4, 8, 3, norm=norm_factory(NormOptions(norm=f"{norm}:ws")), activation=nn.Mish())
    assert type(made.conv) is StandardizedConv2d and made.norm is not None


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "none"])
def test_filters_are_centred_where_asked_for_and_with_mabn(norm):
    for asked in (None, True, False):
        options = NormOptions(norm=norm, weight_centralization=asked)
        made = ConvNormAct.make(4, 8, 3, norm=norm_factory(options), activation=nn.Identity())
        assert isinstance(made.conv, CentralizedConv2d) == (norm == "mabn" if asked is None else asked)


def test_shuffling_images_is_of_use_if_one_part_has_statistics_of_a_rank():
    options = resolve_norm(NormOptions(norm="syncbn", norm_heads="bn", shuffle_bn=True))
    plan = load_plan("yolov4-pico", classes=10)
    norms = [options.of_layer(plan, node).norm for node in plan.nodes]
    assert options.shuffle_bn and {"syncbn", "bn"} <= set(norms)
