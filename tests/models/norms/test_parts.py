"""Norms by part: backbone and heads have what was typed, a layer what its cfg says, and a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import pytest
import torch
from torch import nn

from cfg.convolution import ConvSpec
from cfg.plan import Plan, load_plan, parse_plan
from models.blocks import ConvNormAct
from models.network import Network
from models.norms.bn import FrozenBatchNorm
from models.norms.cbn import CrossIterationBatchNorm
from models.norms.effective_batch import burn_in_warnings, check_values
from models.norms.factory import norm_factory
from models.norms.fold import can_fold
from models.norms.options import NormOptions, norm_of_weights, resolve_norm, stored_norm
from models.norms.parts import norm_parts, parts_in_words
from models.norms.used_weight import CentralizedConv2d
from models.stored_network import build_network, make_checkpoint
from models.weights.convert import write_darknet
from models.weights.start import load_matching, start_from
from models.weights.trained import read_trained
from utils.errors import UserError

CONV = "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\npad=1\nactivation=leaky\n"
HEAD = "[convolutional]\nfilters=18\nactivation=linear\n[yolo]\nmask=0,1,2\nanchors=1,1,2,2,3,3\nclasses=1\n"
# Layers 0 and 1 are the backbone, 2 and 3 neck and head; 4 and 5 have no norm.
TEXT = f"[net]\nwidth=16\nheight=16\n{CONV}{CONV}stride=2\n{CONV}{CONV}{HEAD}"


def plan_of(text: str = TEXT, own: Mapping[int, str] = {}) -> Plan:
    """own: norms in the cfg, by layer."""
    for line in sorted((parse_plan(text, path="a.cfg").nodes[index].line, norm) for index, norm in own.items())[::-1]:
        lines = text.split("\n")
        text = "\n".join([*lines[: line[0]], f"norm={line[1]}", *lines[line[0] :]])
    return parse_plan(text, path="a.cfg")


def network_of(plan: Plan, norm: str, heads: str | None = None, **settings: object) -> Network:
    return Network(plan, norm_factory(NormOptions(norm=norm, norm_heads=heads, **settings), plan))


def norms_of(network: Network) -> list[type]:
    return [type(layer.norm) for layer in network.layers if isinstance(layer, ConvNormAct)][:4]


def words(plan: Plan, norm: str, heads: str | None = None) -> str:
    return parts_in_words(norm_parts(resolve_norm(NormOptions(norm=norm, norm_heads=heads), plan), plan))


def test_backbone_and_heads_have_what_was_typed():
    network = network_of(plan_of(), "frozen", "cbn:window=8")
    assert norms_of(network) == [FrozenBatchNorm] * 2 + [CrossIterationBatchNorm] * 2
    assert network.layers[3].norm.window == 8


def test_a_norm_in_the_cfg_goes_before_both():
    network = network_of(plan_of(own={0: "gn:groups=2", 3: "none"}), "frozen", "cbn")
    assert norms_of(network) == [nn.GroupNorm, FrozenBatchNorm, CrossIterationBatchNorm, type(None)]
    assert network.layers[0].norm.num_groups == 2 and network.layers[3].conv.bias is not None


def test_the_parts_in_words():
    assert words(plan_of(), "bn") == "bn in layers 0 to 3"
    assert words(plan_of(), "frozen", "gn") == "frozen in layers 0 to 1, gn in layers 2 to 3"
    assert words(plan_of(own={1: "gn"}), "frozen") == "frozen in layers 0 and 2 to 3, gn in layer 1"
    assert words(plan_of(own={1: "gn", 3: "gn"}), "bn") == "bn in layers 0 and 2, gn in layers 1 and 3"


def test_equal_norms_are_one_part():
    assert resolve_norm(NormOptions(norm="gn", norm_heads="gn:groups=32")) == resolve_norm(NormOptions(norm="gn"))


@pytest.mark.parametrize("norm", ["batch", "gn:window=3", "gn:groups=0", "auto", "no.such.Norm"])
def test_a_bad_norm_in_a_cfg_is_named_with_its_line(norm):
    plan = plan_of(own={2: norm})
    with pytest.raises(UserError, match=rf"^a\.cfg:{plan.nodes[2].line}: norm={norm}: "):
        resolve_norm(NormOptions(), plan)


@pytest.mark.parametrize(
    ("norm", "heads", "own"), [("frozen", "cbn:window=2", {}), ("gn", None, {1: "cmbn"}), ("mabn", "bn", {3: "none"})]
)
def test_a_checkpoint_keeps_the_parts(norm, heads, own):
    plan = plan_of(own=own)
    options = resolve_norm(NormOptions(norm=norm, norm_heads=heads), plan)
    network = Network(plan, norm_factory(options, plan)).eval()
    again = build_network(
        make_checkpoint(plan, options, network.state_dict(), class_names=("a",), letterbox=True), path="x.pt"
    )
    assert norms_of(again) == norms_of(network)
    assert [type(layer.conv) for layer in again.layers[:4]] == [type(layer.conv) for layer in network.layers[:4]]
    assert stored_norm(asdict(options), plan) == options
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again(images)[0].logits, network(images)[0].logits)


def test_a_checkpoint_of_before_has_one_norm():
    stored = asdict(resolve_norm(NormOptions(norm="cmbn")))
    del stored["norm_heads"]
    assert stored_norm(stored, plan_of()) == resolve_norm(NormOptions(norm="cmbn"))


# --- settings of all parts -----------------------------------------------------------------------------------


def test_a_setting_is_refused_only_if_no_part_uses_it():
    for heads, own in (("cbn", {}), (None, {3: "cbn"})):
        assert resolve_norm(NormOptions(norm="gn", norm_heads=heads, norm_momentum=0.2), plan_of(own=own))
        network = network_of(plan_of(own=own), "gn", heads, norm_momentum=0.2, norm_eps=1e-3)
        assert network.layers[3].norm.momentum == 0.2
        assert network.layers[0].norm.eps == network.layers[3].norm.eps == 1e-3
    with pytest.raises(UserError, match=r"--norm-momentum is for norms .* --norm gn --norm-heads ln does not have"):
        resolve_norm(NormOptions(norm="gn", norm_heads="ln", norm_momentum=0.2), plan_of())
    with pytest.raises(UserError, match="--norm-eps is about a norm"):
        resolve_norm(NormOptions(norm="none", norm_eps=1e-3), plan_of())
    assert network_of(plan_of(), "none", "gn", norm_eps=1e-3).layers[3].norm.eps == 1e-3


def test_each_part_has_its_own_defaults():
    network = network_of(plan_of(), "mabn", "cmbn:gradient=darknet")
    assert [isinstance(layer.conv, CentralizedConv2d) for layer in network.layers[:4]] == [True, True, False, False]
    assert [layer.norm.momentum for layer in network.layers[:4]] == [0.1, 0.1, 0.01, 0.01]
    network = network_of(plan_of(), "mabn", "cmbn:gradient=darknet", weight_centralization=True, norm_momentum=0.1)
    assert all(isinstance(layer.conv, CentralizedConv2d) for layer in network.layers[:4])
    assert [layer.norm.momentum for layer in network.layers[:4]] == [0.1] * 4


def test_a_burn_in_is_fitted_to_the_training_in_both_parts():
    options = resolve_norm(NormOptions(norm="cbn", norm_heads="cbn:window=8")).for_training(50)
    assert [spec.burn_in for spec in options.specs()] == [5, 5]
    assert burn_in_warnings(options, plan_of(own={0: "cmbn:carry"}), 50) == [
        "burn_in_steps=100 is the whole training: cmbn:carry is plain batch norm here"
    ]


def test_a_single_value_is_trouble_only_where_the_norm_needs_two():
    plan = plan_of(TEXT.replace("16", "2"))  # one cell from layer 1 on
    assert check_values(plan, resolve_norm(NormOptions(norm="bn", norm_heads="frozen")), mini_batch=2) is None
    with pytest.raises(UserError, match=r"^a\.cfg:10: layer 1 has one value .* bn cannot"):
        check_values(plan, resolve_norm(NormOptions(norm="bn", norm_heads="frozen")), mini_batch=1)
    with pytest.raises(UserError, match=r"layer 2 has one value .* gn"):
        check_values(plan, resolve_norm(NormOptions(norm="frozen", norm_heads="gn")), mini_batch=1)


def test_one_part_that_depends_on_the_image_keeps_all_unmerged():
    assert can_fold(network_of(plan_of(), "frozen", "cbn"))
    assert not can_fold(network_of(plan_of(), "frozen", "gn"))


# --- darknet's files ------------------------------------------------------------------------------------------


def test_darknets_weights_are_batch_norms_whatever_the_cfg_says(tmp_path):
    """As darknet reads the cfg: exported with norm=cbn, and read again beside norm=gn."""
    plan = plan_of(own={2: "cbn"})
    options = resolve_norm(NormOptions(), plan)
    network = Network(plan, norm_factory(options, plan)).eval()
    checkpoint = make_checkpoint(plan, options, network.state_dict(), class_names=("a",), letterbox=False)
    weights, cfg, _ = write_darknet(tmp_path / "x.weights", checkpoint, source="x.pt")
    assert "norm=cbn\n" in cfg.read_text()
    images = torch.rand(2, 3, 16, 16)
    for other in ("cbn", "gn"):
        cfg.write_text(cfg.read_text().replace("norm=cbn", f"norm={other}"))
        again, _ = read_trained(str(weights), cfg=str(cfg), names=None)
        torch.testing.assert_close(build_network(again)(images)[0].logits, network(images)[0].logits)
    started = network_of(load_plan(str(cfg)), "frozen")  # with gn in layer 2
    said = start_from(str(weights), str(cfg), started)
    assert "this norm has no running means and variances to load" in said
    assert torch.equal(started.layers[2].conv.weight, network.layers[2].conv.weight)


def test_a_layer_that_darknet_cannot_have_is_named(tmp_path):
    plan = plan_of(own={2: "gn"})
    options = resolve_norm(NormOptions(), plan)
    state = Network(plan, norm_factory(options, plan)).state_dict()
    checkpoint = make_checkpoint(plan, options, state, class_names=("a",), letterbox=False)
    with pytest.raises(UserError, match=r"layer 2 .* GroupNorm has no running statistics; darknet has batch norm only"):
        write_darknet(tmp_path / "x.weights", checkpoint, source="x.pt")


# --- a start from weights ------------------------------------------------------------------------------------


def test_weights_of_one_norm_start_two_parts():
    trained = network_of(plan_of(), "bn")
    for name, tensor in trained.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 2)
    network = network_of(plan_of(), "frozen", "cbn:window=2")
    loaded, fresh = load_matching(network, trained.state_dict())
    assert fresh == [] and loaded > 0
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(network.eval()(images)[0].logits, trained.eval()(images)[0].logits)


def test_a_training_from_weights_continues_with_the_norms_of_their_parts():
    stored = asdict(resolve_norm(NormOptions(norm="frozen", norm_heads="gn:groups=4")))
    kept = {"norm_eps": 1e-5, "weight_centralization": False}
    assert norm_of_weights(stored, None) == {"norm": "frozen", "norm_heads": "gn:groups=4", **kept}
    assert norm_of_weights(stored, None, "cbn") == {"norm": "frozen", "norm_heads": "cbn", **kept}
    assert norm_of_weights(stored, "bn") == {"norm": "bn", **kept}
    assert norm_of_weights(stored, "gn") == {"norm": "gn", "norm_heads": "gn:groups=4", **kept}
    assert norm_of_weights(stored, "none", "none") == {"norm": "none"}


def test_the_layers_of_a_part_follow_the_plan():
    plan = plan_of()
    options = resolve_norm(NormOptions(norm="bn", norm_heads="gn"), plan)
    by_layer = {node.index: options.of_layer(plan, node).norm for node in plan.nodes if isinstance(node.spec, ConvSpec)}
    assert by_layer == {0: "bn", 1: "bn", 2: "gn", 3: "gn", 4: "gn"}
